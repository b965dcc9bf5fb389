"""sparse_decode_attention: out_i = sum_j softmax(z_i)_j v_j over a row of keys: sink tokens, listed
blocks, recent tokens, and extra keys.

    z_ij = softcap tanh(scale R(p_i) q_i . R(p_j) k_j / softcap) + log_count_j

R rotates column pairs by the angles of a position. mass_e is the weight of the keys of entry e.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense._common import softmax, weighted_sum
from ..float8 import cache_rows


def sparse_decode_attention(a: Any, *, upcast: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Sq, H, Dv], lse [B, H, Sq] and mass [B, row heads, K] of q [B, Sq, H, D] over caches
    [B, S, Hk, ...] or pages. A row head is a KV head, or a query head if each has its own list; it
    attends to a row of keys: sink tokens, its list, recent tokens, extra keys.
    """
    batch, queries, heads = a.q.shape[:3]
    kv_heads, entries = a.k_cache.shape[2], a.indices.shape[2]
    row_heads = heads if a.indices.shape[1] > kv_heads else kv_heads
    wide = torch.promote_types(a.q.dtype, torch.float32)
    dtype = wide if upcast else a.q.dtype
    out = a.q.new_zeros((batch, queries, heads, a.v_cache.shape[3]))
    lse = a.q.new_empty((batch, heads, queries), dtype=wide)
    mass = a.q.new_zeros((batch, row_heads, entries) if a.return_mass else (0,), dtype=wide)
    for b, h in [(b, h) for b in range(batch) for h in range(row_heads if heads else 0)]:
        length, own = int(a.seqlens_k[b]), min(h, a.indices.shape[1] - 1)
        kv, group = h // (row_heads // kv_heads), heads // row_heads
        mine = slice(h * group, (h + 1) * group)
        position, entry, recent = key_row(
            a.indices[b, own, : max(int(a.counts[b, own]), 0)].tolist(),
            length, queries, a.block_k, a.num_sink, a.num_recent,
        )  # fmt: skip
        at = torch.tensor(position, dtype=torch.long, device=a.q.device)
        page, row, there = slots_of(a.k_cache, b, at, a.block_table)
        k, v = (
            rows_at(cache, scales, page, row, there, kv, dtype)
            for cache, scales in ((a.k_cache, a.k_scale), (a.v_cache, a.v_scale))
        )
        p = torch.arange(queries, device=a.q.device)[:, None] + length - queries
        is_recent = torch.tensor(recent, dtype=torch.bool, device=a.q.device)
        visible = there & (at <= p) & ((at > p - a.num_recent) == is_recent)
        x = a.q[b, :, mine].to(dtype)
        if a.cos is not None:
            turn = at.clamp(min=0), p[:, 0].clamp(min=0)
            if a.pos_mode == "cache":
                place = torch.arange(len(position), device=a.q.device)
                turn = place, (p[:, 0] * 0 + len(position) - 1).clamp(min=0)
            turn = turn[0].clamp(max=len(a.cos) - 1), turn[1].clamp(max=len(a.cos) - 1)
            k = rotate(k, a.cos[turn[0]], a.sin[turn[0]], a.interleaved)
            x = rotate(x, a.cos[turn[1], None], a.sin[turn[1], None], a.interleaved)
        z_extra = None
        if a.extra_k is not None:
            k = torch.cat([k, a.extra_k[b, :, kv].to(dtype)])
            v = torch.cat([v, a.extra_v[b, :, kv].to(dtype)])
            visible = torch.cat([visible, visible.new_ones(queries, a.extra_k.shape[1])], 1)
            if a.extra_log_count is not None:
                z_extra = a.extra_log_count[b, kv].to(dtype)
        z = torch.einsum("qhd,kd->hqk", x, k) * a.scale
        if a.softcap > 0:
            z = a.softcap * torch.tanh(z / a.softcap)
        if z_extra is not None:
            z = z + torch.cat([z_extra.new_zeros(len(position)), z_extra])
        weight, lse[b, mine] = softmax(z, visible, None if a.sink is None else a.sink[mine])
        shared = v[None, :, None].expand(1, -1, weight.shape[0], -1)
        out[b, :, mine] = weighted_sum(weight[None], shared)[0].to(a.q.dtype)
        if a.return_mass:
            added = weight[..., : len(position)].sum((0, 1)).to(wide)
            listed = torch.tensor(entry, dtype=torch.long, device=a.q.device)
            mass[b, h].index_add_(0, listed[listed >= 0], added[listed >= 0])
    return out, lse, mass


def key_row(
    ids: list[int], length: int, queries: int, block_k: int, num_sink: int, num_recent: int
) -> tuple[list[int], list[int], list[bool]]:
    """For each key of the cache in a row: its position, -1 for a skipped key; its list entry, -1
    for none; whether it is a recent token.
    """
    old = max(length - num_recent, 0)  # before the recent tokens of the last query
    sinks = min(num_sink, old)
    first = first_at_least(ids, sinks // block_k)
    last = max(first, first_at_least(ids, -(-old // block_k)))
    position, entry = list(range(sinks)), [-1] * sinks
    for e in range(first, last):
        counts = e == 0 or ids[e] > max(ids[:e])
        for j in range(ids[e] * block_k, (ids[e] + 1) * block_k):
            position.append(j if counts and sinks <= j < length else -1)
            entry.append(e)
    begin = length if num_recent == 0 else max(length - queries + 1 - num_recent, 0)
    recent = [False] * len(position) + [True] * (length - begin)
    return position + list(range(begin, length)), entry + [-1] * (length - begin), recent


def first_at_least(ids: list[int], minimum: int) -> int:
    """Index of the first id that is not below `minimum`; the length if there is none."""
    return next((e for e, x in enumerate(ids) if x >= minimum), len(ids))


def slots_of(
    cache: Tensor, b: int, at: Tensor, block_table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages and rows of positions of a request, and whether they exist."""
    page, row, there = torch.full_like(at, b), at, at >= 0
    if block_table is not None:
        size = cache.shape[1]
        page = block_table[b].long()[torch.where(there, at // size, 0)] if len(at) else at
        there = there & (page >= 0) & (page < cache.shape[0])
        row = at % size
    return page, row, there


def rows_at(
    cache: Tensor,
    scale: Tensor | None,
    page: Tensor,
    row: Tensor,
    there: Tensor,
    kv: int,
    dtype: torch.dtype,
) -> Tensor:
    """Keys or values of a head at slots, 0 where they do not exist."""
    at = page[there], row[there], kv
    if scale is not None:
        scale = scale[at] if scale.dim() == 3 else scale[min(kv, len(scale) - 1)]
    rows = cache.new_zeros(len(page), cache.shape[3], dtype=dtype)
    rows[there] = cache_rows(cache[at], scale, dtype)
    return rows


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs of columns of x [..., D] by angles [..., pairs]."""
    cos, sin, pairs = cos.to(x.dtype), sin.to(x.dtype), cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        return torch.cat(
            [torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), rest], -1
        )
    a, b = turned[..., :pairs], turned[..., pairs:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
