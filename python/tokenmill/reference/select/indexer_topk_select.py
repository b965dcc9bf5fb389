"""indexer_topk_select: lists of the keys (or blocks of keys) that an indexer scores highest.

    s_ij = sum_h w_ih act(q_ih . k_j)

Keys in float8_e4m3fn are codes times a scale, NaN where either is not finite.
A block has the maximum over its listable keys: the visible keys except the first num_sink and the
last num_recent of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import lengths_of, rows_of, sequences_of
from .topk_select import select


def indexer_topk_select(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Lists [B, Sq, topk], counts [B, Sq] and values [B, Sq, topk] of queries [B, Sq, H, D]; packed
    [T, topk], [T] and [T, topk].
    """
    wide = torch.promote_types(a.q.dtype, torch.float32)
    q, k, weights = a.q.to(wide), _scaled(a.k, a.k_scale, wide), a.weights.to(wide)
    if a.cu_seqlens_q is None:
        keys = rows_of(k, a.block_table)
        length = lengths_of(a.seqlens_k, len(keys), keys.shape[1], q.device)
        indices, counts, values = _lists(q, keys, weights, length, a)
    else:
        sequences = sequences_of(k, a.seqlens_k, a.cu_seqlens_q, a.cu_seqlens_k, a.block_table)
        parts = [
            _lists(q[begin:end][None], keys[None], weights[begin:end][None],
                   torch.full((1,), len(keys), device=q.device), a)
            for begin, end, keys in sequences
        ]  # fmt: skip
        if not parts:
            parts = [_nothing(q[None], a.topk)]
        indices, counts, values = (torch.cat([x[0] for x in t]) for t in zip(*parts, strict=True))
    return indices, counts, values if a.return_values else q.new_empty(0)


def _scaled(k: Tensor, k_scale: Tensor | None, wide: torch.dtype) -> Tensor:
    if k_scale is None:
        return k.to(wide)
    return k.to(wide) * torch.where(k_scale.isfinite(), k_scale, torch.nan)[..., None]


def _lists(
    q: Tensor, k: Tensor, weights: Tensor, length: Tensor, a: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists for queries [B, Sq, H, D] and keys [B, Sk, D]."""
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    if keys == 0:
        return _nothing(q, a.topk)
    z = torch.einsum("bihd,bjd->bihj", q, k)
    z = z.relu() if a.activation == "relu" else z
    scores = (weights[..., None] * z).sum(2)

    query, key = torch.arange(queries, device=q.device), torch.arange(keys, device=q.device)
    end = (length - min(a.num_recent, keys))[:, None]
    end = end + (query - queries + 1 if a.causal else 0 * query)
    seen = (key >= a.num_sink) & (key < end[..., None])
    scores = torch.where(seen, scores, -torch.inf)
    block_k = min(a.block_k, keys)
    scores = torch.nn.functional.pad(scores, (0, -keys % block_k), value=-torch.inf)
    scores = scores.unflatten(2, (-1, block_k)).amax(3).flatten(0, 1)

    inside = torch.ones_like(scores, dtype=torch.bool)
    indices, counts, values = (
        t.unflatten(0, (batch, queries)) for t in select(scores, inside, ~inside, a.topk)
    )
    return indices.int(), counts, values


def _nothing(q: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[:2]
    return (
        q.new_full((*rows, topk), -1, dtype=torch.int32),
        q.new_zeros(rows, dtype=torch.int32),
        q.new_full((*rows, topk), -torch.inf),
    )
