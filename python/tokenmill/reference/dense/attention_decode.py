"""attention_decode: out_b = attention(q_b, K_b, V_b), over the keys of request b.

K_b = cache[b, :n_b], or row j of it from cache[block_table[b, j // size], j % size], times its
scale if the cache is in float8_e4m3fn
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..float8 import cache_rows
from .attention import attention


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor | None,
    kind: str,
    normalize: str,
    scale: float,
    score_bias: Tensor | None,
    score_bias_value: float,
    score_bias_neg_log_n: bool,
    mask_ranges: Tensor | None,
    mask_q_spans: Tensor | None,
    mask_k_spans: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    softcap: float,
    causal: bool,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    num_splits: int,
    schedule: str,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    """Each request is a call of attention on its keys in the cache."""
    outs, lses = [], []
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype = wide if upcast else q.dtype
    ends = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for b, length in enumerate(seqlens_k.tolist()):
        k, v = (
            request_rows(cache, scales, b, length, block_table, dtype)
            for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
        )
        per_head = (x if x is None or x.dim() == 1 else x[b] for x in (score_bias, alibi_slopes))
        score_bias_b, slopes = per_head
        k_spans = of_request(mask_k_spans, b)
        if ends is None:
            q_b, ranges = q[b : b + 1], of_request(mask_ranges, b)
        else:
            rows = slice(ends[b], ends[b + 1])
            q_b, ranges = q[None, rows], None if mask_ranges is None else mask_ranges[:, :, rows]
        out, lse = attention(
            q_b,
            k[None],
            v[None],
            kind=kind,
            normalize=normalize,
            scale=scale,
            score_bias=score_bias_b,
            score_bias_value=score_bias_value,
            score_bias_neg_log_n=score_bias_neg_log_n,
            bias=None,
            mask_ranges=ranges,
            mask_q_spans=of_request(mask_q_spans, b),
            mask_k_spans=k_spans if k_spans is None else k_spans[:, :length],
            alibi_slopes=slopes,
            grid_width=0,
            grid_distance="chebyshev",
            grid_window=-1,
            sink=sink,
            softcap=softcap,
            causal=causal,
            window_left=window_left,
            window_right=window_right,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            precision="accurate",
            post_decay=False,
            upcast=upcast,
        )
        outs.append(out if ends is None else out[0])
        lses.append(lse if ends is None or lse.dim() == 1 else lse[0])
    out = q.new_empty((0, *q.shape[1:-1], v_cache.shape[-1]))
    if kind != "softmax" and normalize == "none":
        return torch.cat([out, *outs]), q.new_empty(0, dtype=wide)
    if ends is None:
        lse = q.new_empty((0, q.shape[2], q.shape[1]), dtype=wide)
        return torch.cat([out, *outs]), torch.cat([lse, *lses])
    lse = q.new_empty((q.shape[1], 0), dtype=wide)
    return torch.cat([out, *outs]), torch.cat([lse, *lses], 1)


def of_request(mask: Tensor | None, b: int) -> Tensor | None:
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
