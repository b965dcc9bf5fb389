"""attention_decode: out_b = attention(q_b, K_b, V_b), over the keys of request b.

K_b = cache[b, :n_b], or row j of it from cache[block_table[b, j // size], j % size], times its
scale if the cache is in float8_e4m3fn
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._call.operator import as_record
from ..float8 import cache_rows
from .attention import attention, of_sequence


def attention_decode(a: Any, *, upcast: bool = True) -> tuple[Tensor, Tensor]:
    """q [B, Sq, H, D], packed [T, H, D], caches [B, S, Hk, D] or pages [P, page size, Hk, D] -> out
    [B, Sq, H, Dv], and lse or row sums [B, H, Sq]; packed [T, H, Dv] and [H, T]. Each request is a
    call of attention on its keys in the cache.
    """
    outs, lses = [], []
    wide = torch.promote_types(a.q.dtype, torch.float32)
    ends = None if a.cu_seqlens_q is None else a.cu_seqlens_q.tolist()
    for b, length in enumerate(a.seqlens_k.tolist()):
        rows = None if ends is None else slice(ends[b], ends[b + 1])
        request = _request(a, b, length, rows, wide if upcast else a.q.dtype)
        out, lse = attention(request, upcast=upcast)
        outs.append(out if ends is None else out[0])
        lses.append(lse if ends is None or lse.dim() == 1 else lse[0])
    out = a.q.new_empty((0, *a.q.shape[1:-1], a.v_cache.shape[-1]))
    if a.kind != "softmax" and a.normalize == "none":
        return torch.cat([out, *outs]), a.q.new_empty(0, dtype=wide)
    if ends is None:
        lse = a.q.new_empty((0, a.q.shape[2], a.q.shape[1]), dtype=wide)
        return torch.cat([out, *outs]), torch.cat([lse, *lses])
    lse = a.q.new_empty((a.q.shape[1], 0), dtype=wide)
    return torch.cat([out, *outs]), torch.cat([lse, *lses], 1)


def _request(a: Any, b: int, length: int, rows: slice | None, dtype: torch.dtype) -> Any:
    """The call of attention for request b, whose queries are `rows` of a packed call."""
    k, v = (
        request_rows(cache, scales, b, length, a.block_table, dtype)
        for cache, scales in ((a.k_cache, a.k_scale), (a.v_cache, a.v_scale))
    )
    if rows is None:
        q, ranges = a.q[b : b + 1], _of_request(a.mask_ranges, b)
    else:
        q, ranges = a.q[None, rows], a.mask_ranges
        ranges = None if ranges is None else ranges[:, :, rows]
    k_spans = _of_request(a.mask_k_spans, b)
    return as_record(
        "attention",
        a,
        q=q,
        k=k[None],
        v=v[None],
        score_bias=of_sequence(a.score_bias, b),
        mask_ranges=ranges,
        mask_q_spans=_of_request(a.mask_q_spans, b),
        mask_k_spans=None if k_spans is None else k_spans[:, :length],
        alibi_slopes=of_sequence(a.alibi_slopes, b),
        cu_seqlens_q=None,
        max_seqlen_q=None,
    )


def _of_request(mask: Tensor | None, b: int) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[b : b + 1]


def request_rows(
    cache: Tensor,
    scale: Tensor | None,
    b: int,
    length: int,
    block_table: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[length, Hk, D]: the keys or values of request b, in order."""

    def tokens(x: Tensor) -> Tensor:
        if block_table is None:
            return x[b, :length]
        pages = block_table[b, : -(-length // x.shape[1])].long()
        return x[pages].flatten(0, 1)[:length]

    if scale is not None and scale.dim() == 3:
        scale = tokens(scale)
    return cache_rows(tokens(cache), scale, dtype)
