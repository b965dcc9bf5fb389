"""Positions in rows of tokens, and distances between tokens."""

from __future__ import annotations

import torch
from torch import Tensor

MAX = torch.finfo(torch.float32).max


def places_of(indices: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequence and token of each entry."""
    sequence = torch.arange(len(indices), device=indices.device)[:, None]
    return sequence, torch.where(indices < 0, tokens, indices).long()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[B, Na, Nb] as sums of squared differences, which avoids cancellation."""
    return torch.stack([(a - row[:, None]).square().sum(-1) for row in b.unbind(1)], 2)


def finite(d: Tensor) -> Tensor:
    return torch.where(d <= MAX, d, MAX)
