"""kv_cache_compact: row t of a cache becomes row keep[t], for t < counts.

    k'_t = R(t - keep_t) k_keep_t,    R(d) rotates column pair p by the angle 2 pi d rerotate_p

With compensation, also the sums of the dropped rows, and their number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kv_cache_compact(a: Any, *, upcast: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lengths of the caches as counts, sums [B, Hk, D] and [B, Hk, Dv] of the dropped keys and
    values, and their number [B, Hk]. upcast=False rotates 16-bit keys in 16 bits: the baseline of
    the error budget.
    """
    batch, heads, size = a.keep.shape[0], a.k_cache.shape[2], a.k_cache.shape[1]
    wide = torch.promote_types(a.k_cache.dtype, torch.float32)
    capacity = size if a.block_table is None else a.block_table.shape[1] * size
    caches, device = (a.k_cache, a.v_cache), a.keep.device
    sums = [a.k_cache.new_zeros(batch, heads, c.shape[3], dtype=wide) for c in caches]
    dropped = a.counts.new_zeros(batch, heads)
    for b in range(batch):
        slots = torch.arange(capacity, device=device)
        pages = slots * 0 + b
        if a.block_table is not None:
            pages, slots = a.block_table[b].long().repeat_interleave(size), slots % size
        length = capacity if a.seqlens_k is None else int(a.seqlens_k[b])
        for h in range(heads):
            at = (b,) if a.keep.dim() == 2 else (b, h)
            source = a.keep[at][: a.counts[at]].long()
            target = torch.arange(len(source), device=device)
            gone = torch.ones(length, dtype=torch.bool, device=device)
            gone[source] = False
            dropped[b, h] = gone.sum()
            for cache, total in zip(caches, sums, strict=True):
                rows = cache[pages[:length], slots[:length], h]
                total[b, h] = rows[gone].to(wide).sum(0)
                moved = rows[source]
                if cache is a.k_cache and a.rerotate is not None:
                    turned = _turn(moved, target - source, a, wide if upcast else moved.dtype)
                    moved = torch.where((target == source)[:, None], moved, turned)
                cache[pages[target], slots[target], h] = moved
    if not a.compensation:
        empty = a.k_cache.new_empty(0, dtype=wide)
        return a.counts.clone(), empty, empty.clone(), empty.int()
    return a.counts.clone(), sums[0], sums[1], dropped


def _turn(x: Tensor, delta: Tensor, a: Any, dtype: torch.dtype) -> Tensor:
    """Rotates column pairs of x [T, D] by delta steps each."""
    pairs = a.rerotate.shape[1]
    turns = delta[:, None] * a.rerotate.double().sum(0)
    angle = 2 * torch.pi * (turns - turns.round())
    wide = x.to(dtype)
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    first = slice(0, 2 * pairs, 2) if a.interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if a.interleaved else slice(pairs, 2 * pairs)
    turned = wide.clone()
    turned[:, first] = wide[:, first] * cosine - wide[:, second] * sine
    turned[:, second] = wide[:, second] * cosine + wide[:, first] * sine
    return turned.to(x.dtype)
