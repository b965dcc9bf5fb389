"""indexer_topk_select: lists of the keys (or blocks of keys) that an indexer scores highest.

    s_ij = sum_h w_ih act(q_ih . k_j)

Keys in float8_e4m3fn are codes times a scale, NaN where either is not finite.
A block has the maximum over its listable keys: the visible keys except the first num_sink and the
last num_recent of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import lengths_of, rows_of, sequences_of
from .topk_select import topk_select


def indexer_topk_select(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    causal: bool,
    activation: str,
    block_k: int,
    num_sink: int,
    num_recent: int,
    seqlens_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    return_values: bool,
    k_scale: Tensor | None,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = topk, causal, activation, block_k, num_sink, num_recent
    wide = torch.promote_types(q.dtype, torch.float32)
    k = _scaled(k, k_scale, wide)
    if cu_seqlens_q is None:
        keys = rows_of(k, block_table)
        length = lengths_of(seqlens_k, len(keys), keys.shape[1], q.device)
        lists = _lists(q.to(wide), keys, weights.to(wide), length, *options)
        indices, counts, values = lists
    else:
        sequences = sequences_of(k, seqlens_k, cu_seqlens_q, cu_seqlens_k, block_table)
        parts = [
            _lists(q[a:b][None].to(wide), keys[None], weights[a:b][None].to(wide),
                   torch.full((1,), len(keys), device=q.device), *options)
            for a, b, keys in sequences
        ]  # fmt: skip
        if not parts:
            parts = [_nothing(q[None], topk)]
        indices, counts, values = (torch.cat([x[0] for x in t]) for t in zip(*parts, strict=True))
    return indices, counts, values if return_values else q.new_empty(0, dtype=wide)


def _scaled(k: Tensor, k_scale: Tensor | None, wide: torch.dtype) -> Tensor:
    if k_scale is None:
        return k.to(wide)
    return k.to(wide) * torch.where(k_scale.isfinite(), k_scale, torch.nan)[..., None]


def _lists(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    length: Tensor,
    topk: int,
    causal: bool,
    activation: str,
    block_k: int,
    num_sink: int,
    num_recent: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists for queries [B, Sq, H, D] and keys [B, Sk, D]."""
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    if keys == 0:
        return _nothing(q, topk)
    z = torch.einsum("bihd,bjd->bihj", q, k)
    z = z.relu() if activation == "relu" else z
    scores = (weights[..., None] * z).sum(2)

    query, key = torch.arange(queries, device=q.device), torch.arange(keys, device=q.device)
    num_recent = min(num_recent, keys)
    end = (length - num_recent)[:, None] + (query - queries + 1 if causal else 0 * query)
    seen = (key >= num_sink) & (key < end[..., None])
    scores = torch.where(seen, scores, -torch.inf)
    block_k = min(block_k, keys)
    scores = torch.nn.functional.pad(scores, (0, -keys % block_k), value=-torch.inf)
    scores = scores.unflatten(2, (-1, block_k)).amax(3)

    found = topk_select(
        scores.flatten(0, 1), topk, None, None, "low", "index", 0, 0, None, 1, None, True, None
    )
    indices, counts, values = (t.unflatten(0, (batch, queries)) for t in found[:3])
    return indices, counts, values


def _nothing(q: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[:2]
    return (
        q.new_full((*rows, topk), -1, dtype=torch.int32),
        q.new_zeros(rows, dtype=torch.int32),
        q.new_full((*rows, topk), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)),
    )
