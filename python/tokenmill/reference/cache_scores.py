"""Oracles of the operators of `select` that score and compact a cache, in plain PyTorch. Each takes
the arguments of its schema."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import expand_heads, softmax


def attention_column_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    reduce: str,
    window_queries: int | None,
    head_reduce: str,
    lengths: Tensor | None,
    query_lengths: Tensor | None,
    gumbel_tau: float,
    seed: int,
    *,
    upcast: bool = True,
) -> tuple[Tensor]:
    """upcast=False keeps 16-bit inputs in 16 bits: the baseline of the error budget."""
    batch, rows, heads = q.shape[:3]
    columns, kv_heads = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    if upcast:
        q, k = q.to(wide), k.to(wide)
    n_rows = _lengths(query_lengths, rows, q)
    n_columns = _lengths(lengths, columns, q)
    first = n_rows * 0 if window_queries is None else (n_rows - window_queries).clamp(min=0)
    i = torch.arange(rows, device=q.device)[:, None]
    j = torch.arange(columns, device=q.device)
    counted = (i >= first) & (i < n_rows)
    diagonal = n_columns - n_rows
    visible = counted & (j < n_columns)
    if causal:
        visible = visible & (j <= i + diagonal)

    z = torch.einsum("bihd,bjhd->bhij", q, expand_heads(k, heads)) * scale
    if gumbel_tau > 0:
        noise = [
            gumbel_noise(seed, 1, heads, rows, columns, first_batch=b, first_row=int(d), dtype=wide)
            for b, d in enumerate(diagonal.flatten().tolist())
        ]
        z = (z + torch.cat(noise).to(z)) / gumbel_tau if noise else z
    if lse is None:
        p = torch.where(visible, softmax(z, visible, None)[0], 0)  # also the NaN of its row
    else:
        p = torch.where(visible & (lse > -torch.inf)[..., None], torch.exp(z - lse[..., None]), 0)
        p = p.to(z.dtype)
    scores = p.sum(2).to(wide)
    if reduce != "sum":
        count = (counted if reduce == "mean" else visible).sum(2)
        scores = scores / count.clamp(min=1)
    if head_reduce != "none":
        if heads == 0:
            return (scores.new_zeros(batch, kv_heads, columns),)
        grouped = scores.view(batch, kv_heads, heads // kv_heads, columns)
        scores = grouped.mean(2) if head_reduce == "group_mean" else grouped.amax(2)
    return (scores,)


def _lengths(given: Tensor | None, longest: int, q: Tensor) -> Tensor:
    """[B, 1, 1, 1]"""
    if given is None:
        return torch.full((q.shape[0], 1, 1, 1), longest, device=q.device)
    return given.long()[:, None, None, None]


def gumbel_words(
    seed: int,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    *,
    first_batch: int = 0,
    first_row: int = 0,
) -> Tensor:
    """The first word of Philox4x32-10 for counter (b, h, i, j) and key seed, int64
    [batch, heads, rows, columns]. Rows count from first_row, as 32-bit words."""
    b, h, i, j = (
        (torch.arange(n) + start) & 0xFFFFFFFF
        for n, start in ((batch, first_batch), (heads, 0), (rows, first_row), (columns, 0))
    )
    c = list(torch.broadcast_tensors(b[:, None, None, None], h[:, None, None], i[:, None], j))
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        high0, low0 = _multiply(c[0], 0xD2511F53)
        high1, low1 = _multiply(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64 bits of x m, which int64 has no room for."""
    low = x * (m & 0xFFFF)
    high = x * (m >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)


def gumbel_noise(
    seed: int,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    *,
    first_batch: int = 0,
    first_row: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""The noise of :func:`tokenmill.attention_column_scores`: :math:`-\log(-\log u)` with u in the
    middle of one of 2^23 parts of (0, 1), which the high bits of the words of Philox choose.

    Args:
        seed: of the call.
        batch, heads, rows, columns: the shape.
        first_batch, first_row: numbers of the first sequence and of the first row; row 0 of a call
            has the number lengths - query_lengths, its position among the keys.
        dtype: float32 or float64.

    Returns:
        ``[batch, heads, rows, columns]`` on the CPU.

    Example:
        >>> import torch, tokenmill as tm
        >>> tm.select.gumbel_noise(1, 1, 1, 1, 3)
        tensor([[[[ 1.1283,  0.1254, -0.3163]]]])
    """
    words = gumbel_words(
        seed, batch, heads, rows, columns, first_batch=first_batch, first_row=first_row
    )
    u = ((words >> 9).double() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u)).to(dtype)


def attention_row_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    reduce: str,
    skip: int,
    lengths: Tensor | None,
    *,
    upcast: bool = True,
) -> tuple[Tensor]:
    """upcast=False keeps 16-bit inputs in 16 bits: the baseline of the error budget."""
    rows, heads = q.shape[1:3]
    columns = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    if upcast:
        q, k = q.to(wide), k.to(wide)
    length = _lengths(lengths, columns, q)
    j = torch.arange(columns, device=q.device)
    visible = j < length
    if causal:
        visible = visible & (j <= torch.arange(rows, device=q.device)[:, None] + length - rows)
    z = torch.einsum("bihd,bjhd->bhij", q, expand_heads(k, heads)) * scale
    if lse is None:
        p = softmax(z, visible, None)[0]
    else:
        p = torch.where((lse > -torch.inf)[..., None], torch.exp(z - lse[..., None]), 0)
    p = torch.where(visible, p.to(wide), 0)[..., skip:]
    if reduce == "none":
        return (p,)
    p = p.flatten(1, 2)
    if p.shape[1] == 0:
        return (p.sum(1),)
    return ({"sum": p.sum(1), "mean": p.mean(1), "max": p.amax(1)}[reduce],)


def kv_cache_compact(
    k_cache: Tensor,
    v_cache: Tensor,
    keep: Tensor,
    counts: Tensor,
    lengths: Tensor | None,
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
        length = capacity if lengths is None else int(lengths[b])
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
    """Pairs of the columns of x rotated by delta steps each."""
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
