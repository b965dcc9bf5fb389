"""Errors that name operator, argument, rule and value.

csrc/core/check.h writes the same text for the native backends; tests/test_contract.py compares the
two on every malformed call of the registry.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch


class InputError(RuntimeError, ValueError):
    """A call that breaks a rule of its operator. Native kernels raise RuntimeError, same text."""


def show(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return "cpu" if value.type == "cpu" else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {show(value.shape)}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(show(v) for v in value) + "]"
    return str(value)


def fail(op: str, argument: str, rule: str, value: Any) -> NoReturn:
    raise InputError(f"tokenmill.{op}: {argument}: {rule}; got {show(value)}")


def check(ok: bool, op: str, argument: str, rule: str, value: Any) -> None:
    if not ok:
        fail(op, argument, rule, value)


def check_tensor(op: str, argument: str, value: Any, *, optional: bool = False) -> None:
    if not (isinstance(value, torch.Tensor) or (optional and value is None)):
        fail(op, argument, "must be a tensor" + (" or None" if optional else ""), value)


def check_last_contiguous(op: str, argument: str, t: torch.Tensor) -> None:
    ok = t.dim() == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1 or t.numel() == 0
    check(ok, op, argument, "must have a contiguous last dimension; strides", t.stride())


def check_dtype(op: str, argument: str, t: torch.Tensor, *, float64: bool) -> None:
    ok = t.dtype in (torch.float16, torch.bfloat16, torch.float32)
    ok = ok or (float64 and t.dtype == torch.float64)
    check(ok, op, argument, "must be float16, bfloat16 or float32", t.dtype)


def synchronising_checks() -> bool:
    """TOKENMILL_CHECK=1: also check values that lie on a GPU, at the price of a synchronisation."""
    return os.environ.get("TOKENMILL_CHECK") == "1"
