"""topk_partition: positions sorted by (class, score), both descending, ties by position; the first
k are kept. A protected position has class 2, an invalid one class 0, others class 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_partition(
    scores: Tensor,
    k: int,
    counts: Tensor | None,
    largest: bool,
    order: str,
    valid: Tensor | None,
    protect_first: int,
    protect_last: int,
) -> tuple[Tensor, Tensor]:
    tokens = scores.shape[1]
    value = (scores if largest else -scores) + 0.0  # -0 + 0 = 0
    value = torch.where(value > -torch.inf, value, -torch.inf)
    index = torch.arange(tokens, device=scores.device)
    protected = (index < protect_first) | (index >= tokens - protect_last)
    rank = torch.ones_like(scores, dtype=torch.int8) if valid is None else valid.to(torch.int8)
    rank = rank.masked_fill(protected, 2)
    value = value.masked_fill(rank != 1, 0.0)

    # Two stable sorts: by value, then by rank.
    by_value = value.argsort(dim=1, descending=True, stable=True)
    by_rank = rank.gather(1, by_value).argsort(dim=1, descending=True, stable=True)
    ordered = by_value.gather(1, by_rank).int()
    kept = index < (k if counts is None else counts[:, None])
    # Positions of the other side are sorted after the last.
    keep, rest = ordered.masked_fill(~kept, tokens)[:, :k], ordered.masked_fill(kept, tokens)
    if order == "index":
        keep = keep.sort(1).values
    rest = rest.sort(1).values[:, : tokens - k if counts is None else tokens]
    return _or_none(keep, tokens), _or_none(rest, tokens)


def _or_none(indices: Tensor, tokens: int) -> Tensor:
    return indices.masked_fill(indices == tokens, -1).contiguous()
