"""gather_tokens: out_i = x[indices_i], and 0 where the index is -1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather_tokens(a: Any) -> tuple[Tensor]:
    """x [B, N, C], indices [B, K], or [K] into all tokens of x."""
    if a.indices.dim() == 1:
        return (rows_at(a.x.flatten(0, 1)[None], a.indices[None])[0],)
    return (rows_at(a.x, a.indices),)


def rows_at(x: Tensor, indices: Tensor) -> Tensor:
    """Rows [B, K, C] of x [B, N, C] at indices [B, K], zeros at -1."""
    # An index of -1 reads a row of zeros appended after the last.
    padded = torch.cat((x, x.new_zeros(len(x), 1, x.shape[2])), 1)
    return padded[places_of(indices, x.shape[1])]


def places_of(indices: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequence and token of each entry of indices [B, K]; -1 gives token N."""
    sequence = torch.arange(len(indices), device=indices.device)[:, None]
    return sequence, torch.where(indices < 0, tokens, indices).long()
