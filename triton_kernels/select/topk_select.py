"""topk_select: radix select of the k-th key of a row in four 8-bit digits, then positions in order.

Keys are unsigned integers ordered as the scores; key 0 is never selected.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INF, launch

TILE = 2048
BINS = tl.constexpr(256)
# Arguments excluded from specialization.
SIZES = ["stride", "columns", "k", "force_first", "force_last"]


class Windows(NamedTuple):
    """Search window in each row of scores [R, n]. Positions are relative to its start."""

    data: Tensor
    lengths: Tensor | None
    starts: Tensor | None


@triton.jit
def window_of(rows, i_r, stride, columns):
    """Pointer to position 0, and number of positions."""
    i_start = tl.zeros([], tl.int64)
    if rows.starts is not None:
        i_start = tl.minimum(tl.maximum(tl.load(rows.starts + i_r).to(tl.int64), 0), columns)
    length = columns - i_start
    if rows.lengths is not None:
        length = tl.minimum(length, tl.maximum(tl.load(rows.lengths + i_r).to(tl.int64), 0))
    return rows.data + i_r * stride + i_start, length.to(tl.int32)


@triton.jit
def keys_of(p_row, o_i, m_i):
    b_x = tl.load(p_row + o_i, mask=m_i, other=-INF).to(tl.float32)
    b_bits = (b_x + 0.0).to(tl.uint32, bitcast=True)  # -0 + 0 = 0
    b_negative = (b_bits >> 31) != 0
    b_key = tl.where(b_negative, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)
    return tl.where(b_x > -INF, b_key, 0).to(tl.uint32)


@triton.jit
def digit_counts(p_row, begin, end, prefix, DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    """Histogram of digit DIGIT over the keys that share the prefix."""
    b_bins = tl.zeros([BINS], tl.int32)
    for i_tile in range(begin, end, BLOCK):
        o_i = i_tile + tl.arange(0, BLOCK)
        b_key = keys_of(p_row, o_i, o_i < end)
        m_key = b_key != 0
        if DIGIT > 0:
            m_key = m_key & ((b_key >> (32 - 8 * DIGIT)) == prefix)
        b_digit = ((b_key >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
        b_bins += tl.histogram(b_digit, BINS, mask=m_key)
    return b_bins


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    rows, indices, counts, stride, columns, k, force_first, force_last,
    TIE_HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    p_row, length = window_of(rows, i_r, stride, columns)
    begin = tl.minimum(length, force_first)
    end = tl.maximum(begin, length - force_last)
    wanted = k - begin - (length - end)

    threshold = tl.zeros([], tl.uint32)
    equal = tl.zeros([], tl.int32)
    o_bin = tl.arange(0, BINS)
    for DIGIT in tl.static_range(4):
        b_bins = digit_counts(p_row, begin, end, threshold, DIGIT, BLOCK)
        b_through = tl.cumsum(b_bins, 0)
        total = tl.sum(b_bins, 0)
        wanted = tl.minimum(wanted, total)  # take all if there are fewer than wanted
        b_above = total - b_through
        m_bin = (b_above < wanted) & (wanted <= b_above + b_bins)
        digit = tl.sum(tl.where(m_bin, o_bin, 0), 0)
        equal = tl.sum(tl.where(m_bin, b_bins, 0), 0)
        wanted -= tl.sum(tl.where(m_bin, b_above, 0), 0)
        threshold = (threshold << 8) | digit.to(tl.uint32)
    if equal == 0:  # nothing wanted or nothing found: no key exceeds this threshold
        threshold = tl.full([], 0xFFFFFFFF, tl.uint32)

    p_out = indices + i_r * k
    first_tie = equal - wanted if TIE_HIGH else 0
    above = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for i_tile in range(begin, end, BLOCK):
        o_i = i_tile + tl.arange(0, BLOCK)
        b_key = keys_of(p_row, o_i, o_i < end)
        b_tied = ((b_key == threshold) & (o_i < end)).to(tl.int32)
        o_tie = ties + tl.cumsum(b_tied, 0) - b_tied  # rank among the ties
        m_tie = (b_tied != 0) & (o_tie >= first_tie) & (o_tie < first_tie + wanted)
        b_taken = ((b_key > threshold) | m_tie).to(tl.int32)
        o_taken = above + tl.cumsum(b_taken, 0) - b_taken
        tl.store(p_out + begin + o_taken, o_i, mask=b_taken != 0)
        above += tl.sum(b_taken, 0)
        ties += tl.sum(b_tied, 0)

    for i_tile in range(0, begin, BLOCK):
        o_i = i_tile + tl.arange(0, BLOCK)
        tl.store(p_out + o_i, o_i, mask=o_i < begin)
    last = begin + above
    count = last + length - end
    for i_tile in range(last, k, BLOCK):
        o_i = i_tile + tl.arange(0, BLOCK)
        tl.store(p_out + o_i, tl.where(o_i < count, end + o_i - last, -1), mask=o_i < k)
    tl.store(counts + i_r, count)


PAGE_SIZES = ["page_stride", "page_rows", "pages", "page_size", "total"]


@triton.jit(do_not_specialize=[*SIZES[:3], *PAGE_SIZES])
def beside_kernel(
    rows, indices, values, block_table, row_to_batch, physical, stride, columns, k, page_stride,
    page_rows, pages, page_size, total,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores and physical slots of the selected positions."""
    o_all = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_all = o_all < total
    o_r = tl.minimum(o_all, total - 1) // k
    b_i = tl.load(indices + o_all, mask=m_all, other=-1)
    m_i = b_i >= 0
    if values is not None:
        o_start = tl.zeros([BLOCK], tl.int64)
        if rows.starts is not None:
            o_start = tl.load(rows.starts + o_r).to(tl.int64)
            o_start = tl.minimum(tl.maximum(o_start, 0), columns)
        p_x = rows.data + o_r * stride + o_start + b_i
        tl.store(values + o_all, tl.load(p_x, mask=m_i, other=-INF), mask=m_all)
    if physical is not None:
        b_batch = o_r
        if row_to_batch is not None:
            b_batch = tl.load(row_to_batch + o_r).to(tl.int64)
        b_page = b_i // page_size
        m_page = m_i & (b_batch >= 0) & (b_batch < page_rows) & (b_page < pages)
        p_page = block_table + b_batch * page_stride + b_page
        b_found = tl.load(p_page, mask=m_page, other=-1).to(tl.int64)
        b_slot = b_found * page_size + b_i % page_size
        m_slot = (b_found >= 0) & (b_slot < 2147483648)
        tl.store(physical + o_all, tl.where(m_slot, b_slot, -1).to(tl.int32), mask=m_all)


def topk_select(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, columns = a.scores.shape
    indices = a.scores.new_empty((count, a.k), dtype=torch.int32)
    counts = a.scores.new_empty((count,), dtype=torch.int32)
    values = a.scores.new_empty((count, a.k) if a.return_values else (0,))
    paged = a.block_table is not None
    physical = a.scores.new_empty((count, a.k) if paged else (0,), dtype=torch.int32)
    if count == 0:
        return indices, counts, values, physical
    rows, stride = Windows(a.scores, a.lengths, a.row_starts), a.scores.stride(0)
    block = min(TILE, max(32, triton.next_power_of_2(columns)))
    launch(
        select_kernel, count, a.scores, rows, indices, counts, stride, columns, a.k, a.force_first,
        a.force_last, TIE_HIGH=a.tie == "high", BLOCK=block, num_warps=8,
    )  # fmt: skip
    if a.order == "score":
        _order_by_score(indices, a)
    if a.return_values or paged:
        pages = (a.block_table, a.row_to_batch, physical) if paged else (None,) * 3
        shape = a.block_table.shape if paged else (0, 0)
        page_stride = a.block_table.stride(0) if paged else 0
        launch(
            beside_kernel, triton.cdiv(count * a.k, TILE), a.scores, rows, indices,
            values if a.return_values else None, *pages, stride, columns, a.k, page_stride, *shape,
            a.page_size, count * a.k, BLOCK=TILE,
        )  # fmt: skip
    return indices, counts, values, physical


def _order_by_score(indices: Tensor, a: Any) -> None:
    """Sorts in place by score. The positions are ascending and the sort is stable."""
    columns = a.scores.shape[1]
    if columns == 0:
        return
    found = indices.long()
    start = 0 if a.row_starts is None else a.row_starts.long().clamp(0, columns)[:, None]
    score = a.scores.gather(1, (found.clamp(min=0) + start).clamp(max=columns - 1)).float()
    # Forced positions with a score of -inf or NaN come last, before the empty places.
    score = torch.where(score > -torch.inf, score, -torch.inf)
    if a.tie == "high":
        found, score = found.flip(1), score.flip(1)
    by_score = score.argsort(dim=1, descending=True, stable=True)
    found = found.gather(1, by_score)
    empty_last = (found < 0).int().argsort(dim=1, stable=True)
    indices.copy_(found.gather(1, empty_last))
