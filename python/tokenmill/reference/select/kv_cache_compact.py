"""kv_cache_compact: row t of a cache becomes row keep[t], for t < counts.

    k'_t = R(t - keep_t) k_keep_t,    R(d) rotates column pair p by the angle 2 pi d rotations_p

With compensation, also the sums of the dropped rows, and their number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kv_cache_compact(
    k_cache: Tensor,
    v_cache: Tensor,
    keep: Tensor,
    counts: Tensor,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    rotations: Tensor | None,
    interleaved: bool,
    compensation: bool,
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """upcast=False rotates 16-bit keys in 16 bits: the baseline of the error budget."""
    batch, heads, size = keep.shape[0], k_cache.shape[2], k_cache.shape[1]
    wide = torch.promote_types(k_cache.dtype, torch.float32)
    capacity = size if block_table is None else block_table.shape[1] * size
    sums = [k_cache.new_zeros(batch, heads, c.shape[3], dtype=wide) for c in (k_cache, v_cache)]
    dropped = counts.new_zeros(batch, heads)
    for b in range(batch):
        slots = torch.arange(capacity, device=keep.device)
        pages = slots * 0 + b
        if block_table is not None:
            pages, slots = block_table[b].long().repeat_interleave(size), slots % size
        length = capacity if seqlens_k is None else int(seqlens_k[b])
        for h in range(heads):
            kept = keep[b, : counts[b]] if keep.dim() == 2 else keep[b, h, : counts[b, h]]
            source = kept.long()
            target = torch.arange(len(source), device=keep.device)
            gone = torch.ones(length, dtype=torch.bool, device=keep.device)
            gone[source] = False
            dropped[b, h] = gone.sum()
            for cache, total in zip((k_cache, v_cache), sums, strict=True):
                rows = cache[pages[:length], slots[:length], h]
                total[b, h] = rows[gone].to(wide).sum(0)
                moved = rows[source]
                if cache is k_cache and rotations is not None:
                    delta = target - source
                    turned = _turn(moved, delta, rotations, interleaved, wide if upcast else None)
                    moved = torch.where(delta[:, None] == 0, moved, turned)
                cache[pages[target], slots[target], h] = moved
    if not compensation:
        empty = k_cache.new_empty(0, dtype=wide)
        return counts.clone(), empty, empty.clone(), empty.int()
    return counts.clone(), sums[0], sums[1], dropped


def _turn(
    x: Tensor, delta: Tensor, rotations: Tensor, interleaved: bool, dtype: torch.dtype | None
) -> Tensor:
    """Rotates column pairs of x by delta steps each."""
    pairs = rotations.shape[1]
    turns = delta[:, None] * rotations.double().sum(0)
    angle = 2 * torch.pi * (turns - turns.round())
    wide = x if dtype is None else x.to(dtype)
    cosine, sine = angle.cos().to(wide.dtype), angle.sin().to(wide.dtype)
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    turned = wide.clone()
    turned[:, first] = wide[:, first] * cosine - wide[:, second] * sine
    turned[:, second] = wide[:, second] * cosine + wide[:, first] * sine
    return turned.to(x.dtype)
