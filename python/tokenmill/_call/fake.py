"""Fake kernels: the rules of a call and the shapes of its results, without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._check import check_device_of
from .operator import TorchOp


def call_fake(op: TorchOp, *args: Any, **kwargs: Any) -> Any:
    values = op.bind(args, kwargs)
    if not _is_wide_on_meta(values):
        op.check(*values)
    elif not op.differentiates:
        op.check(*values, float64=True)
    # Also reached by a call with one tensor on meta; its results would be uninitialised memory.
    given = zip(op.arguments, values, strict=True)
    tensors = [(name, t) for name, t in given if isinstance(t, torch.Tensor)]
    first, anchor = tensors[0]
    for name, t in tensors[1:]:
        check_device_of(op.name, name, t, first, anchor)
    return op.fake(op.record(*values))


def _is_wide_on_meta(values: Sequence[Any]) -> bool:
    """Whether the call asks for the shapes of float64, which only the reference can run. (Within a
    graph tensors report the device that they will run on.)
    """
    first = values[0]
    if not isinstance(first, torch.Tensor):
        return False
    return first.dtype == torch.float64 and first.device.type == "meta"
