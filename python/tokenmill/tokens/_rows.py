"""Rows of tokens: the forms that operators take them in, and checks of rows and of indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import check, check_device_of, check_dtype, check_last_contiguous, fail, show

INT32 = torch.iinfo(torch.int32)


def as_rows(t: Tensor, rank: int) -> Tensor:
    """Merges the dimensions after the first `rank` into one, of size 1 where there are none. Copies
    only where strides require it.
    """
    if t.dim() == rank:
        return t.unsqueeze(-1)
    return t.flatten(rank) if t.dim() > rank + 1 else t


def as_int32(indices: Any) -> Any:
    """int64 as int32; values that do not fit become another value out of range."""
    if isinstance(indices, Tensor) and indices.dtype == torch.int64:
        return indices.clamp(INT32.min, INT32.max).to(torch.int32)
    return indices


def contiguous_rows(t: Tensor) -> Tensor:
    """A gradient with contiguous rows; it may arrive as an expanded tensor."""
    return t.contiguous() if t.dim() and t.stride(-1) != 1 else t


def check_tokens(op: str, name: str, t: Tensor, *, float64: bool) -> None:
    """Checks tokens [B, N, C] that take part in arithmetic."""
    check(t.dim() == 3, op, name, "must have 3 dimensions [B, N, C]", t.dim())
    check_dtype(op, name, t, float64=float64)
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


def check_index_values(op: str, name: str, t: Tensor, tokens: int, *, repeats: bool = True) -> None:
    """Each index is -1 (no row) to tokens - 1, and no token repeats within a row unless repeats are
    allowed.
    """
    bad = t[(t < -1) | (t >= tokens)]
    if bad.numel():
        fail(op, name, f"must be -1 to {tokens - 1}", int(bad[0]))
    if repeats:
        return
    ordered = t.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        fail(op, name, "must not name a token twice", int(ordered[..., 1:][twice][0]))
