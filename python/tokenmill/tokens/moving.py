"""How the operators that move tokens see their arguments: rows [B, N, C] and int32 indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INT32 = torch.iinfo(torch.int32)


def as_rows(t: Tensor, rank: int) -> Tensor:
    """The dimensions after the first `rank` as one, of size 1 where there are none. A copy only
    where strides force one."""
    if t.dim() == rank:
        return t.unsqueeze(-1)
    return t.flatten(rank) if t.dim() > rank + 1 else t


def as_int32(indices: Any) -> Any:
    """int64 as int32; what does not fit becomes another value out of range."""
    if isinstance(indices, Tensor) and indices.dtype == torch.int64:
        return indices.clamp(INT32.min, INT32.max).to(torch.int32)
    return indices


def contiguous_rows(t: Tensor) -> Tensor:
    """A gradient with contiguous rows: it may come expanded."""
    return t.contiguous() if t.dim() and t.stride(-1) != 1 else t
