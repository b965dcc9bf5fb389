"""Fake kernels: the rules of a call and the shapes of its results, without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._check import check_device_of, check_tensor
from .operator import TorchOp


def check(op: TorchOp, args: tuple[Any, ...], **options: bool) -> None:
    """torch passes None for any tensor: csrc/core/torch.cpp has the same check."""
    for name, value in zip(op.arguments, args, strict=True):
        if value is None and name in op.tensors:
            check_tensor(op.name, name, value)
    op.check(*args, **options)


def call_fake(op: TorchOp, *args: Any, **kwargs: Any) -> Any:
    values = op.bind(args, kwargs)
    if not _is_wide_on_meta(values):
        check(op, values)
    elif not op.differentiates:
        check(op, values, float64=True)
    # Also reached by a call with one tensor on meta; its results would be uninitialised memory.
    given = zip(op.arguments, values, strict=True)
    tensors = [(name, t) for name, t in given if isinstance(t, torch.Tensor)]
    first, anchor = tensors[0]
    for name, t in tensors[1:]:
        check_device_of(op.name, name, t, first, anchor)
    return op.fake(*values)


def _is_wide_on_meta(values: Sequence[Any]) -> bool:
    """Whether the call asks for the shapes of float64, which only the reference can run. (Within a
    graph tensors report the device that they will run on.)
    """
    first = values[0]
    if not isinstance(first, torch.Tensor):
        return False
    return first.dtype == torch.float64 and first.device.type == "meta"
