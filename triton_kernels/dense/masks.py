"""Attention masks in kernels: visibility of pairs, and lists of tiles that hold a visible pair.

A list belongs to one block of queries of a head and names key tiles, or to one block of keys and
names query tiles. It begins with the counts of partially and fully visible tiles. Partial tiles
follow in ascending order; full tiles fill the list from its end, so that both can grow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tokenmill.masks import MAX_RANGES

from ..common import LENGTHS, Lengths, key_block, query_block, visible, visible_parts

INT32_MAX = tl.constexpr(2**31 - 1)
INT32_MIN = tl.constexpr(-(2**31))
RANGE_SLOTS = tl.constexpr(MAX_RANGES)
COUNTS = tl.constexpr(2)  # entries before the tiles of a list
LISTED = 512  # rows listed per step; small, to save registers


class PairMask(NamedTuple):
    """Mask terms other than causal and window; None: absent. A key is visible if it lies in one of
    the ranges (begin, end) of its query, and if the id spans (first, last) of query and key
    overlap. All tensors are contiguous. Strides, in rows of all queries or keys, are 0 where
    broadcast. None is a length: Triton specializes kernels on the integers in a tuple."""

    ranges: Tensor | None  # [B | 1, H | 1, Sq, RANGES, 2]
    ranges_batch: int
    ranges_head: int
    q_spans: Tensor | None  # [B | 1, Sq, 2]
    q_spans_batch: int
    k_spans: Tensor | None  # [B | 1, Sk, 2]
    k_spans_batch: int


class Rules(NamedTuple):
    """Mask pointers at query 0 and key 0 of a sequence."""

    ranges: Any
    q_spans: Any
    k_spans: Any


class Reach(NamedTuple):
    """Union of what a set of queries may see: a span of ids, and key ranges [RANGE_SLOTS]."""

    first: Any
    last: Any
    begins: Any
    ends: Any


class Lists(NamedTuple):
    """One list per block of rows; batch and head are 0 where broadcast, else 1. data None: only
    causal and window restrict visibility."""

    data: Tensor | None  # [B | 1 times blocks, heads, width], packed [all blocks, ...]
    batch: int
    head: int
    heads: int


class Walk(NamedTuple):
    """Tiles that a block sees. With a list, parts are entries of it: part 1 is fully visible, part
    2 partially. p_list None: parts are those of band, in rows."""

    p_list: Any
    width: Any
    parts: Any  # ends of three runs of entries, as visible_parts
    band: Any  # the same in rows, of causal and window


@triton.jit
def rules_of(mask, i_b, o_h, sequence, tokens_q, tokens_k, RANGES: tl.constexpr):
    ranges = None
    q_spans = None
    k_spans = None
    if mask.ranges is not None:
        o_rows = (i_b * mask.ranges_batch + tl.cast(o_h, tl.int64) * mask.ranges_head) * tokens_q
        ranges = mask.ranges + (o_rows + sequence.q_start) * (2 * RANGES)
    if mask.q_spans is not None:
        q_spans = mask.q_spans + 2 * (i_b * mask.q_spans_batch * tokens_q + sequence.q_start)
        k_spans = mask.k_spans + 2 * (i_b * mask.k_spans_batch * tokens_k + sequence.k_start)
    return Rules(ranges, q_spans, k_spans)


@triton.jit
def load_pairs(p_pairs, o_row, m_row, PAIRS: tl.constexpr = 1, PAIR: tl.constexpr = 0):
    """Begin and end of pair PAIR out of PAIRS, for rows o_row."""
    p_pair = p_pairs + (o_row.to(tl.int64) * (2 * PAIRS) + 2 * PAIR)
    return tl.load(p_pair, mask=m_row, other=0), tl.load(p_pair + 1, mask=m_row, other=0)


@triton.jit
def allowed(m_tile, o_i, o_j, m_i, m_j, rules, RANGES: tl.constexpr):
    """m_tile with the mask applied for queries o_i and keys o_j, which broadcast to its shape and
    are loaded under m_i and m_j."""
    # id spans of query and key overlap
    if rules.q_spans is not None:
        b_first_q, b_last_q = load_pairs(rules.q_spans, o_i, m_i)
        b_first_k, b_last_k = load_pairs(rules.k_spans, o_j, m_j)
        m_tile = m_tile & (b_first_q <= b_last_k) & (b_first_k <= b_last_q)
    # key in one of the query's ranges
    if rules.ranges is not None:
        m_any = tl.zeros_like(m_tile)
        for r in tl.static_range(RANGES):
            b_begin, b_end = load_pairs(rules.ranges, o_i, m_i, RANGES, r)
            m_any = m_any | ((b_begin <= o_j) & (o_j < b_end))
        m_tile = m_tile & m_any
    return m_tile


@triton.jit
def seen(o_i, o_j, sequence, window, rules, RANGES: tl.constexpr):
    m_tile = visible(o_i, o_j, sequence, window)
    m_i = o_i < sequence.q_length
    return allowed(m_tile, o_i, o_j, m_i, o_j < sequence.k_length, rules, RANGES)


@triton.jit
def hull(b_begin, b_end):
    """Hull of all non-empty ranges."""
    m_empty = b_begin >= b_end
    minimum = tl.min(tl.where(m_empty, INT32_MAX, b_begin), 0)
    return minimum, tl.max(tl.where(m_empty, INT32_MIN, b_end), 0)


@triton.jit
def reach_of(rules, o_i, m_i, RANGES: tl.constexpr):
    """Reach of queries o_i [M, 1] under m_i."""
    first = None
    last = None
    begins = None
    ends = None
    if rules.q_spans is not None:
        b_first, b_last = load_pairs(rules.q_spans, o_i, m_i)
        first = tl.min(tl.min(tl.where(m_i, b_first, INT32_MAX), 0), 0)
        last = tl.max(tl.max(tl.where(m_i, b_last, INT32_MIN), 0), 0)
    if rules.ranges is not None:
        o_range = tl.arange(0, RANGE_SLOTS)[None, :]
        m_range = m_i & (o_range < RANGES)
        p_range = rules.ranges + (o_i.to(tl.int64) * (2 * RANGES) + 2 * o_range)
        b_begin = tl.load(p_range, mask=m_range, other=0)
        begins, ends = hull(b_begin, tl.load(p_range + 1, mask=m_range, other=0))
    return Reach(first, last, begins, ends)


@triton.jit
def reached_span(begin, end, reach):
    """Hull of the keys begin .. end - 1 that the ranges reach."""
    begin = tl.minimum(tl.maximum(begin, tl.min(reach.begins, 0)), end)
    return begin, tl.maximum(tl.minimum(end, tl.max(reach.ends, 0)), begin)


@triton.jit
def list_reached(p_list, begin, end, rules, reach, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Stores the first key of each tile of begin .. end - 1 that may hold a visible key, for all
    threads of the program to read. Returns their count."""
    count = tl.zeros([], tl.int32)
    for j in range(begin, end, BLOCK * TILES):
        o_begin = j + BLOCK * tl.arange(0, TILES)
        m_tile = o_begin < end
        if rules.k_spans is not None:
            o_j = o_begin[:, None] + tl.arange(0, BLOCK)[None, :]
            b_first, b_last = load_pairs(rules.k_spans, o_j, o_j < end)
            m_j = (o_j < end) & (reach.first <= b_last) & (b_first <= reach.last)
            m_tile = tl.max(m_j.to(tl.int32), 1) != 0
        if rules.ranges is not None:
            m_range = o_begin[:, None] < reach.ends[None, :]
            m_range = m_range & (o_begin[:, None] + BLOCK > reach.begins[None, :])
            m_tile = m_tile & (tl.max(m_range.to(tl.int32), 1) != 0)
        b_tile = m_tile.to(tl.int32)
        tl.store(p_list + (count - 1) + tl.cumsum(b_tile, 0), o_begin, mask=m_tile)
        count += tl.sum(b_tile, 0)
    tl.debug_barrier()
    return count


@triton.jit
def list_of(lists, width, cu_seqlens, blocks, block, BLOCK: tl.constexpr):
    """List of a block, or None. A packed sequence has one more list than it has whole blocks."""
    p_list = None
    if lists.data is not None:
        i_list = block.i_b * lists.batch
        if cu_seqlens is None:
            i_list *= blocks
        i_list += block.start // BLOCK + block.first // BLOCK
        p_list = lists.data + (i_list * lists.heads + block.i_h * lists.head) * width
    return p_list


@triton.jit
def walk_of(
    lists, longest, cu_seqlens, blocks, block, band, OWN: tl.constexpr, BLOCK: tl.constexpr
):
    """Walk over tiles of BLOCK rows, at most longest in all, for a block of OWN rows."""
    width = COUNTS + tl.cdiv(longest, BLOCK)
    p_list = list_of(lists, width, cu_seqlens, blocks, block, OWN)
    parts = band
    if p_list is not None:
        parts = 0, -tl.load(p_list + 1), 0, tl.load(p_list)
    return Walk(p_list, width, parts, band)


@triton.jit
def key_walk(lists, window, cu_seqlens, lengths, block, sequence, C):
    """Tiles of keys that a block of queries sees."""
    band = visible_parts(
        block.first, block.last, sequence.diagonal, window.left, window.right, sequence.k_length,
        C.BLOCK_N,
    )  # fmt: skip
    return walk_of(
        lists, lengths.longest_k, cu_seqlens.q, lengths.blocks, block, band, C.BLOCK_M, C.BLOCK_N
    )


@triton.jit
def query_walk(lists, window, cu_seqlens, lengths, block, sequence, C):
    """Tiles of queries that see a block of keys: queries j - diagonal - right to j - diagonal +
    left see key j."""
    band = visible_parts(
        block.first, block.last, -sequence.diagonal, window.right, window.left, sequence.q_length,
        C.BLOCK_M,
    )  # fmt: skip
    return walk_of(
        lists, lengths.longest_q, cu_seqlens.k, lengths.blocks, block, band, C.BLOCK_N, C.BLOCK_M
    )


@triton.jit
def first_of(walk, n, PART: tl.constexpr, BLOCK: tl.constexpr):
    """First row of entry n of a part."""
    first = n
    if walk.p_list is not None:
        p_tile = walk.p_list + n
        if PART == 1:
            p_tile += walk.width
        else:
            p_tile += COUNTS
        first = tl.load(p_tile) * BLOCK
    return first


@triton.jit
def append(p_list, width, o_tile, m_some, m_all, partial, whole):
    """Appends visible tiles to a list that holds partial and whole tiles; m_all marks the full
    ones."""
    b_all = m_all.to(tl.int32)
    b_part = (m_some & (b_all == 0)).to(tl.int32)
    p_part = p_list + (COUNTS - 1 + partial) + tl.cumsum(b_part, 0)
    tl.store(p_part, o_tile, mask=b_part != 0)
    p_whole = p_list + (width - whole) - tl.cumsum(b_all, 0)
    tl.store(p_whole, o_tile, mask=b_all != 0)
    return partial + tl.sum(b_part, 0), whole + tl.sum(b_all, 0)


@triton.jit(do_not_specialize=LENGTHS)
def key_tiles_kernel(
    lists, window, mask, cu_seqlens,
    tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks,
    RANGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Lists the key tiles of one block of queries."""
    lengths = Lengths(tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks)
    block, sequence = query_block(cu_seqlens, lengths, heads, BLOCK_M)
    first, last = block.first, block.last
    if first >= sequence.q_length:
        return
    o_i = tl.minimum(first + tl.arange(0, BLOCK_M), last)
    rules = rules_of(mask, block.i_b, block.i_h, sequence, tokens_q, tokens_k, RANGES)
    width = COUNTS + tl.cdiv(longest_k, BLOCK_N)
    p_list = list_of(lists, width, cu_seqlens.q, blocks, block, BLOCK_M)
    partial = tl.zeros([], tl.int32)
    whole = tl.zeros([], tl.int32)
    for t in range(0, tl.cdiv(sequence.k_length, BLOCK_N), TILES):
        o_tile = t + tl.arange(0, TILES)
        o_begin = o_tile * BLOCK_N
        o_j = o_begin[:, None] + tl.arange(0, BLOCK_N)[None, :]
        m_some = o_j < sequence.k_length
        m_all = m_some
        if window.left is not None:
            m_some = m_some & (o_j >= first + (sequence.diagonal - window.left))
            m_all = m_all & (o_j >= last + (sequence.diagonal - window.left))
        if window.right is not None:
            m_some = m_some & (o_j <= last + (sequence.diagonal + window.right))
            m_all = m_all & (o_j <= first + (sequence.diagonal + window.right))
        if rules.q_spans is not None:
            b_first_q, b_last_q = load_pairs(rules.q_spans, o_i, o_i <= last)
            b_first, b_last = load_pairs(rules.k_spans, o_j, o_j < sequence.k_length)
            m_some = m_some & (tl.min(b_first_q, 0) <= b_last) & (b_first <= tl.max(b_last_q, 0))
            m_all = m_all & (tl.max(b_first_q, 0) <= b_last) & (b_first <= tl.min(b_last_q, 0))
        m_some = tl.max(m_some.to(tl.int32), 1) != 0
        m_all = tl.min(m_all.to(tl.int32), 1) != 0
        if rules.ranges is not None:
            m_some_range = tl.zeros_like(m_some)
            m_all_range = tl.zeros_like(m_all)
            for r in tl.static_range(RANGES):
                b_begin, b_end = load_pairs(rules.ranges, o_i, o_i <= last, RANGES, r)
                minimum, maximum = hull(b_begin, b_end)
                m_some_range = m_some_range | ((o_begin < maximum) & (o_begin + BLOCK_N > minimum))
                m_holds = (o_begin >= tl.max(b_begin, 0)) & (o_begin + BLOCK_N <= tl.min(b_end, 0))
                m_all_range = m_all_range | m_holds
            m_some = m_some & m_some_range
            m_all = m_all & m_all_range
        partial, whole = append(p_list, width, o_tile, m_some, m_all, partial, whole)
    tl.store(p_list, partial)
    tl.store(p_list + 1, whole)


@triton.jit(do_not_specialize=LENGTHS)
def query_tiles_kernel(
    lists, window, mask, cu_seqlens,
    tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks,
    RANGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Lists the query tiles of one block of keys: one list for all heads of a GQA group. A tile is
    partial if any head sees a pair, full if all heads see all pairs."""
    lengths = Lengths(tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks)
    block, sequence = key_block(cu_seqlens, lengths, heads, BLOCK_N)
    first, last = block.first, block.last
    if first >= sequence.k_length:
        return
    o_j = tl.minimum(first + tl.arange(0, BLOCK_N), last)
    rules = rules_of(mask, block.i_b, block.i_h * group, sequence, tokens_q, tokens_k, RANGES)
    width = COUNTS + tl.cdiv(longest_q, BLOCK_M)
    p_list = list_of(lists, width, cu_seqlens.k, blocks, block, BLOCK_N)
    partial = tl.zeros([], tl.int32)
    whole = tl.zeros([], tl.int32)
    for t in range(0, tl.cdiv(sequence.q_length, BLOCK_M), TILES):
        o_tile = t + tl.arange(0, TILES)
        o_i = o_tile[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        m_i = o_i < sequence.q_length
        m_some = m_i
        m_all = m_i
        if window.left is not None:
            m_some = m_some & (o_i + (sequence.diagonal - window.left) <= last)
            m_all = m_all & (o_i + (sequence.diagonal - window.left) <= first)
        if window.right is not None:
            m_some = m_some & (o_i + (sequence.diagonal + window.right) >= first)
            m_all = m_all & (o_i + (sequence.diagonal + window.right) >= last)
        if rules.q_spans is not None:
            b_first_k, b_last_k = load_pairs(rules.k_spans, o_j, o_j <= last)
            b_first, b_last = load_pairs(rules.q_spans, o_i, m_i)
            m_some = m_some & (tl.min(b_first_k, 0) <= b_last) & (b_first <= tl.max(b_last_k, 0))
            m_all = m_all & (tl.max(b_first_k, 0) <= b_last) & (b_first <= tl.min(b_last_k, 0))
        if rules.ranges is not None:
            m_some_head = tl.zeros_like(m_some)
            for h in range(group):
                m_all_range = tl.zeros_like(m_all)
                for r in tl.static_range(RANGES):
                    p_ranges = rules.ranges + tl.cast(h, tl.int64) * tokens_q * (2 * RANGES)
                    b_begin, b_end = load_pairs(p_ranges, o_i, m_i, RANGES, r)
                    m_some_head = m_some_head | (
                        (b_begin < b_end) & (b_begin <= last) & (b_end > first)
                    )
                    m_all_range = m_all_range | ((b_begin <= first) & (b_end > last))
                m_all = m_all & m_all_range
            m_some = m_some & m_some_head
        m_some = tl.max(m_some.to(tl.int32), 1) != 0
        m_all = tl.min(m_all.to(tl.int32), 1) != 0
        partial, whole = append(p_list, width, o_tile, m_some, m_all, partial, whole)
    tl.store(p_list, partial)
    tl.store(p_list + 1, whole)


def mask_of(ranges: Tensor | None, q_spans: Tensor | None, k_spans: Tensor | None) -> PairMask:
    return PairMask(
        ranges,
        0 if ranges is None or ranges.shape[0] == 1 else ranges.shape[1],
        int(ranges is not None and ranges.shape[1] > 1),
        q_spans,
        int(q_spans is not None and q_spans.shape[0] > 1),
        k_spans,
        int(k_spans is not None and k_spans.shape[0] > 1),
    )


def ranges_in(ranges: Tensor | None) -> int:
    """Ranges per query."""
    return 0 if ranges is None else ranges.shape[3]
