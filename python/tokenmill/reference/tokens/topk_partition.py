"""topk_partition: positions sorted by (class, score), both descending, ties by position; the first
k are kept. A protected position has class 2, an invalid one class 0, others class 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def topk_partition(a: Any) -> tuple[Tensor, Tensor]:
    """scores [B, N], counts [B] or None, valid [B, N] or None: keep [B, k] and rest [B, N - k], [B,
    N] with counts.
    """
    tokens = a.scores.shape[1]
    value = (a.scores if a.largest else -a.scores) + 0.0  # -0 + 0 = 0
    value = torch.where(value > -torch.inf, value, -torch.inf)
    index = torch.arange(tokens, device=value.device)
    protected = (index < a.protect_first) | (index >= tokens - a.protect_last)
    rank = torch.ones_like(value, dtype=torch.int8) if a.valid is None else a.valid.to(torch.int8)
    rank = rank.masked_fill(protected, 2)
    value = value.masked_fill(rank != 1, 0.0)

    # Two stable sorts: by value, then by rank.
    by_value = value.argsort(dim=1, descending=True, stable=True)
    by_rank = rank.gather(1, by_value).argsort(dim=1, descending=True, stable=True)
    ordered = by_value.gather(1, by_rank).int()
    kept = index < (a.k if a.counts is None else a.counts[:, None])
    # Positions of the other side are sorted after the last.
    keep, rest = ordered.masked_fill(~kept, tokens)[:, : a.k], ordered.masked_fill(kept, tokens)
    if a.order == "index":
        keep = keep.sort(1).values
    rest = rest.sort(1).values[:, : tokens - a.k if a.counts is None else tokens]
    return _or_none(keep, tokens), _or_none(rest, tokens)


def _or_none(indices: Tensor, tokens: int) -> Tensor:
    return indices.masked_fill(indices == tokens, -1).contiguous()
