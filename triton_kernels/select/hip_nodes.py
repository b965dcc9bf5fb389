"""Nodes of a hip_block_select search: halving, and selection of the best halves. They are exchanged
between threads through per-program memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

BINS = tl.constexpr(256)


class Memory(NamedTuple):
    """Memory of one program: kept nodes, their halves, and the list of halves without a score."""

    kept_begin: Any
    kept_end: Any
    half_begin: Any
    half_end: Any
    todo: Any
    kept_score: Any
    half_score: Any


@triton.jit
def representative(b_begin, b_end, REPRESENTATIVE: tl.constexpr):
    b_block = b_begin
    if REPRESENTATIVE == 1:
        b_block = b_begin + (b_end - b_begin) // 2
    if REPRESENTATIVE == 2:
        b_block = b_end - 1
    return b_block


@triton.jit
def memory_of(places, values, NODES: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    p = places + i * (8 * NODES)
    p_value = values + i * (3 * NODES)
    return Memory(
        p, p + NODES, p + 2 * NODES, p + 4 * NODES, p + 6 * NODES, p_value, p_value + NODES
    )


@triton.jit
def bar_of(b_key, m_key, wanted):
    """Radix select: the wanted-th largest key, and the number of its ties to keep."""
    bar = tl.zeros([], tl.uint32)
    o_bin = tl.arange(0, BINS)
    for DIGIT in tl.static_range(4):
        m_digit = m_key
        if DIGIT > 0:
            m_digit = m_key & ((b_key >> (32 - 8 * DIGIT)) == bar)
        b_digit = ((b_key >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
        b_bins = tl.histogram(b_digit, BINS, mask=m_digit)
        b_above = tl.sum(b_bins, 0) - tl.cumsum(b_bins, 0)
        m_bin = (b_above < wanted) & (wanted <= b_above + b_bins)
        digit = tl.sum(tl.where(m_bin, o_bin, 0), 0)
        wanted -= tl.sum(tl.where(m_bin, b_above, 0), 0)
        bar = (bar << 8) | digit.to(tl.uint32)
    return bar, wanted


@triton.jit
def keep_best(memory, count, wanted, NODES: tl.constexpr):
    """Keeps the `wanted` best of `count` halves, in order; ties go to the lower block. Returns the
    number kept."""
    o_half = tl.arange(0, 2 * NODES)
    m_half = o_half < count
    b_score = tl.load(memory.half_score + o_half, mask=m_half, other=0.0)
    b_taken = m_half.to(tl.int32)
    if count > wanted:
        b_bits = (b_score + 0.0).to(tl.uint32, bitcast=True)  # -0 + 0 = 0
        b_key = tl.where((b_bits >> 31) != 0, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)
        bar, ties = bar_of(b_key, m_half, wanted)
        b_tied = (m_half & (b_key == bar)).to(tl.int32)
        o_tie = tl.cumsum(b_tied, 0) - b_tied
        b_taken = (m_half & ((b_key > bar) | ((b_tied != 0) & (o_tie < ties)))).to(tl.int32)
    o_place = tl.cumsum(b_taken, 0) - b_taken
    m_taken = b_taken != 0
    b_begin = tl.load(memory.half_begin + o_half, mask=m_half, other=0)
    b_end = tl.load(memory.half_end + o_half, mask=m_half, other=0)
    tl.store(memory.kept_begin + o_place, b_begin, mask=m_taken)
    tl.store(memory.kept_end + o_place, b_end, mask=m_taken)
    tl.store(memory.kept_score + o_place, b_score, mask=m_taken)
    tl.debug_barrier()
    return tl.minimum(count, wanted)


@triton.jit
def halve(memory, count, REPRESENTATIVE: tl.constexpr, NODES: tl.constexpr):
    """Splits kept nodes into halves. A half that shares the representative of its node inherits its
    score. Returns the number of halves, and of halves without a score."""
    o_node = tl.arange(0, NODES)
    m_node = o_node < count
    b_begin = tl.load(memory.kept_begin + o_node, mask=m_node, other=0)
    b_end = tl.load(memory.kept_end + o_node, mask=m_node, other=0)
    b_score = tl.load(memory.kept_score + o_node, mask=m_node, other=0.0)
    b_middle = b_begin + (b_end - b_begin) // 2
    b_known = representative(b_begin, b_end, REPRESENTATIVE)
    m_left = m_node & (b_middle > b_begin)
    m_same_left = representative(b_begin, b_middle, REPRESENTATIVE) == b_known
    m_same_right = representative(b_middle, b_end, REPRESENTATIVE) == b_known
    b_left = tl.where(m_same_left, b_score, float("nan"))
    b_right = tl.where(m_same_right, b_score, float("nan"))
    b_count = m_node.to(tl.int32) + m_left.to(tl.int32)
    o_left = tl.cumsum(b_count, 0) - b_count
    o_right = o_left + m_left.to(tl.int32)
    tl.store(memory.half_begin + o_left, b_begin, mask=m_left)
    tl.store(memory.half_end + o_left, b_middle, mask=m_left)
    tl.store(memory.half_score + o_left, b_left, mask=m_left)
    tl.store(memory.half_begin + o_right, b_middle, mask=m_node)
    tl.store(memory.half_end + o_right, b_end, mask=m_node)
    tl.store(memory.half_score + o_right, b_right, mask=m_node)
    m_new_left = m_left & (b_left != b_left)
    m_new_right = m_node & (b_right != b_right)
    b_new = m_new_left.to(tl.int32) + m_new_right.to(tl.int32)
    o_new = tl.cumsum(b_new, 0) - b_new
    tl.store(memory.todo + o_new, o_left, mask=m_new_left)
    tl.store(memory.todo + o_new + m_new_left.to(tl.int32), o_right, mask=m_new_right)
    tl.debug_barrier()
    return tl.sum(b_count, 0), tl.sum(b_new, 0)


@triton.jit
def largest_of(memory, count, NODES: tl.constexpr):
    o_node = tl.arange(0, NODES)
    b_begin = tl.load(memory.kept_begin + o_node, mask=o_node < count, other=0)
    b_end = tl.load(memory.kept_end + o_node, mask=o_node < count, other=0)
    return tl.max(b_end - b_begin, 0)


@triton.jit
def add_blocks(memory, kept, first, more, NODES: tl.constexpr):
    """Kept blocks followed by `more` new blocks from `first` on, all as halves."""
    o_node = tl.arange(0, NODES)
    m_kept = o_node < kept
    b_begin = tl.load(memory.kept_begin + o_node, mask=m_kept, other=0)
    b_score = tl.load(memory.kept_score + o_node, mask=m_kept, other=0.0)
    tl.store(memory.half_begin + o_node, b_begin, mask=m_kept)
    tl.store(memory.half_end + o_node, b_begin + 1, mask=m_kept)
    tl.store(memory.half_score + o_node, b_score, mask=m_kept)
    m_more = o_node < more
    tl.store(memory.half_begin + kept + o_node, first + o_node, mask=m_more)
    tl.store(memory.half_end + kept + o_node, first + o_node + 1, mask=m_more)
    tl.store(memory.todo + o_node, kept + o_node, mask=m_more)
    tl.debug_barrier()
