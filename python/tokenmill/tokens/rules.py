"""Checks shared by operators on tokens. csrc/tokens/checks.h has them in the same order and
words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import check, check_device_of, check_dtype, check_last_contiguous, fail, show
from .._kv_cache import check_int32
from .._written import check_written

MOVABLE = (torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64)


def check_tokens(op: str, name: str, t: Tensor, *, float64: bool) -> None:
    """Checks tokens [B, N, C] that take part in arithmetic."""
    check(t.dim() == 3, op, name, "must have 3 dimensions [B, N, C]", t.dim())
    check_dtype(op, name, t, float64=float64)
    _check_rows(op, name, t)


def check_movable_tokens(op: str, name: str, t: Tensor, *, float64: bool) -> None:
    """Checks tokens [B, N, C] that are only moved."""
    check(t.dim() == 3, op, name, "must have 3 dimensions [B, N, C]", t.dim())
    ok = t.dtype in MOVABLE or (float64 and t.dtype == torch.float64)
    rule = "must be float16, bfloat16, float32, int32 or int64"
    check(ok, op, name, rule, t.dtype)
    _check_rows(op, name, t)


def _check_rows(op: str, name: str, t: Tensor) -> None:
    check_last_contiguous(op, name, t)
    tokens = t.shape[0] * t.shape[1]
    check(tokens < 2**31, op, name, "must have fewer than 2^31 tokens in all", tokens)


def check_like(
    op: str, name: str, t: Tensor, shape: list[int], dtype: torch.dtype, other: str, first: Tensor
) -> None:
    """Checks the shape and dtype that `other` implies, and its device."""
    if list(t.shape) != shape:
        fail(op, name, f"must have shape {show(shape)}", t.shape)
    if t.dtype != dtype:
        fail(op, name, f"must be {show(dtype)}", t.dtype)
    check_last_contiguous(op, name, t)
    check_device_of(op, name, t, other, first)


def check_out(op: str, out: Tensor, shape: list[int], read: dict[str, Tensor]) -> None:
    """Checks a preallocated result: shape, dtype and device of the first input, no overlapping
    elements, and no memory shared with an input.
    """
    other, first = next(iter(read.items()))
    check_like(op, "out", out, shape, first.dtype, other, first)
    check_written(op, "out", out, {**read})


def check_indices(op: str, name: str, t: Tensor, batch: int, other: str, first: Tensor) -> None:
    """Checks indices, [B, K] int32."""
    rule = f"must have shape [{batch}, K]"
    check(t.dim() == 2 and t.shape[0] == batch, op, name, rule, t.shape)
    check_int32(op, name, t)
    check_last_contiguous(op, name, t)
    check_device_of(op, name, t, other, first)


def check_index_values(
    op: str, name: str, t: Tensor, tokens: int, *, minimum: int = -1, repeats: bool = True
) -> None:
    """Each index is `least` (-1: no row, 0: a row) to tokens - 1, and no token repeats within a row
    unless repeats are allowed.
    """
    bad = t[(t < minimum) | (t >= tokens)]
    if bad.numel():
        fail(op, name, f"must be {minimum} to {tokens - 1}", int(bad[0]))
    if repeats:
        return
    ordered = t.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        fail(op, name, "must not name a token twice", int(ordered[..., 1:][twice][0]))
