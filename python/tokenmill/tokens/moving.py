"""Argument forms of operators that move tokens: rows [B, N, C] and int32 indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
