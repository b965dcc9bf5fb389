"""hip_block_select: a program searches for one query block. Its nodes go through memory of its own
where they change places: halves, and those that are kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INF, Rows, dot, launch
from .keys import KEY_SIZES, KeyRows, key_sizes, length_of, load_keys

TILE_ROWS = 64  # of keys, of a product
PIECE_BYTES = 128  # of a row
BINS = tl.constexpr(256)
REPRESENTATIVES = {"first": 0, "middle": 1, "last": 2}


class Lists(NamedTuple):
    """Lists to start from; strides in elements."""

    indices: Tensor
    counts: Tensor
    indices_batch: int
    indices_head: int
    indices_block: int
    counts_batch: int
    counts_head: int
    counts_block: int


class Block(NamedTuple):
    """Query block i_block of list i_list: its queries, which count the keys before end (the last
    query) and from num_sink on, and the admissible blocks of keys."""

    i_b: Any
    i_list: Any
    i_block: Any
    last: Any  # query
    columns: Any  # queries that speak for the block, of all heads
    rows: Any  # of a head
    length: Any
    end: Any
    first: Any
    until: Any


class Memory(NamedTuple):
    """Of one program: nodes that were kept, their halves, halves without a score."""

    kept_begin: Any
    kept_end: Any
    half_begin: Any
    half_end: Any
    todo: Any
    kept_score: Any
    half_score: Any


class Sizes(NamedTuple):
    """What the search is about."""

    queries: Any
    block_q: Any
    stride_q: Any
    block_k: Any
    wanted: Any
    num_sink: Any
    num_recent: Any
    group: Any  # query heads of a list
    shared: Any  # lists of a key head
    restart_span: Any


SIZES = list(Sizes._fields)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def representative(b_begin, b_end, REPRESENTATIVE: tl.constexpr):
    b_block = b_begin
    if REPRESENTATIVE == 1:
        b_block = b_begin + (b_end - b_begin) // 2
    if REPRESENTATIVE == 2:
        b_block = b_end - 1
    return b_block


@triton.jit
def end_of(sizes, length, o_query, CAUSAL: tl.constexpr):
    """A query counts no key from here on."""
    o_end = length - sizes.num_recent + o_query * 0
    if CAUSAL:
        o_end += o_query - sizes.queries + 1
    return o_end


@triton.jit
def block_of(sizes, lengths, key_count, lists, blocks, CAUSAL: tl.constexpr):
    i = tl.program_id(0)
    i_block = i % blocks
    i_list = i // blocks % lists
    i_b = (i // (blocks * lists)).to(tl.int64)
    begin = i_block * sizes.block_q
    last = tl.minimum(begin + sizes.block_q, sizes.queries) - 1
    rows = (last - begin) // sizes.stride_q + 1
    length = length_of(lengths, i_b, key_count)
    end = end_of(sizes, length, last, CAUSAL)
    some = end > sizes.num_sink
    first = tl.where(some, sizes.num_sink // sizes.block_k, 0)
    until = tl.where(some, (end + sizes.block_k - 1) // sizes.block_k, 0).to(tl.int32)
    return Block(
        i_b, i_list, i_block, last, rows * sizes.group, rows, length, end, first.to(tl.int32), until
    )


@triton.jit
def memory_of(places, values, NODES: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    p = places + i * (8 * NODES)
    p_value = values + i * (3 * NODES)
    return Memory(
        p, p + NODES, p + 2 * NODES, p + 4 * NODES, p + 6 * NODES, p_value, p_value + NODES
    )


@triton.jit
def score_halves(q, keys, memory, block, sizes, count, REPRESENTATIVE: tl.constexpr,
                 CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Of the first `count` halves that are to be done: BLOCK_N at a time, BLOCK_T keys of each."""
    o_bt = tl.arange(0, BLOCK_N * BLOCK_T)
    for i_n in range(0, count, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        o_half = tl.load(memory.todo + i_n + o_bt // BLOCK_T, mask=i_n + o_bt // BLOCK_T < count,
                         other=0)  # fmt: skip
        b_begin = tl.load(memory.half_begin + o_half)
        b_end = tl.load(memory.half_end + o_half)
        o_key = representative(b_begin, b_end, REPRESENTATIVE).to(tl.int64) * sizes.block_k
        m_n = i_n + o_bt // BLOCK_T < count
        b_most = tl.full([BLOCK_N], -INF, tl.float32)
        for i_t in range(0, sizes.block_k, BLOCK_T):
            o_in = i_t + o_bt % BLOCK_T
            o_t = o_key + o_in
            m_t = m_n & (o_in < sizes.block_k) & (o_t >= sizes.num_sink) & (o_t < block.end)
            for i_m in range(0, block.columns, BLOCK_M):
                o_m = i_m + tl.arange(0, BLOCK_M)
                m_m = o_m < block.columns
                o_query = block.last - o_m % block.rows * sizes.stride_q
                o_head = block.i_list * sizes.group + o_m // block.rows
                o_q = block.i_b * q.batch + o_query.to(tl.int64) * q.seq
                o_q += o_head.to(tl.int64) * q.head
                b_z = tl.zeros([BLOCK_M, BLOCK_N * BLOCK_T], tl.float32)
                for i_d in tl.static_range(0, DIM, BLOCK_D):
                    o_d = i_d + tl.arange(0, BLOCK_D)
                    m_q = m_m[:, None] & (o_d < DIM)[None, :]
                    b_q = tl.load(q.data + o_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
                    b_k, _ = load_keys(
                        keys, block.i_b, block.i_list // sizes.shared, o_t, m_t, o_d, o_d < DIM
                    )
                    b_z += dot(b_q, tl.trans(b_k))
                o_end = end_of(sizes, block.length, o_query, CAUSAL)
                m_z = m_m[:, None] & m_t[None, :] & (o_t[None, :] < o_end[:, None])
                b_z = tl.where(m_z & (b_z == b_z), b_z, -INF)
                b_tile = tl.reshape(tl.max(b_z, 0), [BLOCK_N, BLOCK_T])
                b_most = tl.maximum(b_most, tl.max(b_tile, 1))
        p_score = memory.half_score + tl.load(memory.todo + o_n, mask=o_n < count, other=0)
        tl.store(p_score, b_most, mask=o_n < count)


@triton.jit
def bar_of(b_key, m_key, wanted):
    """The wanted-th key, by digits, and how many of its equals are wanted."""
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
    """The best of `count` halves, in order; of equal ones the lower blocks. Returns how many."""
    o_half = tl.arange(0, 2 * NODES)
    m_half = o_half < count
    b_score = tl.load(memory.half_score + o_half, mask=m_half, other=0.0)
    b_taken = m_half.to(tl.int32)
    if count > wanted:
        b_bits = (b_score + 0.0).to(tl.uint32, bitcast=True)  # -0 + 0 = 0
        b_key = tl.where((b_bits >> 31) != 0, ~b_bits, b_bits | 0x80000000).to(tl.uint32)
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
    """Kept nodes to their halves; a half with the representative of its node has its score. Returns
    how many there are, and how many have none."""
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
def start_nodes(memory, block, wanted, NODES: tl.constexpr):
    o_node = tl.arange(0, NODES)
    n = (block.until - block.first).to(tl.int64)
    b_begin = block.first + (n * o_node // wanted).to(tl.int32)
    b_end = block.first + (n * (o_node + 1) // wanted).to(tl.int32)
    tl.store(memory.kept_begin + o_node, b_begin, mask=o_node < wanted)
    tl.store(memory.kept_end + o_node, b_end, mask=o_node < wanted)
    tl.store(memory.kept_score + o_node, tl.full([NODES], float("nan"), tl.float32))
    tl.debug_barrier()


@triton.jit
def groups_of(p_list, block, o_i, count, span):
    """Groups of the ids of a list, -1 for those that are not admissible."""
    b_id = tl.load(p_list + o_i, mask=(o_i >= 0) & (o_i < count), other=-1)
    return tl.where((b_id >= block.first) & (b_id < block.until), b_id // span, -1)


@triton.jit
def list_nodes(memory, lists, block, sizes, NODES: tl.constexpr):
    """The nodes of a list. An id begins one if its group comes behind those of all before it."""
    i_list = block.i_list.to(tl.int64)
    i_block = block.i_block.to(tl.int64)
    p_list = lists.indices + block.i_b * lists.indices_batch + i_list * lists.indices_head
    p_list += i_block * lists.indices_block
    p_count = lists.counts + block.i_b * lists.counts_batch + i_list * lists.counts_head
    count = tl.minimum(tl.load(p_count + i_block * lists.counts_block), sizes.wanted)
    o_i = tl.arange(0, NODES)
    b_group = groups_of(p_list, block, o_i, count, sizes.restart_span)
    b_before = groups_of(p_list, block, o_i - 1, count, sizes.restart_span)
    m_new = b_group > tl.associative_scan(b_before, 0, larger)
    b_begin = b_group.to(tl.int64) * sizes.restart_span
    b_end = tl.minimum(b_begin + sizes.restart_span, block.until).to(tl.int32)
    b_begin = tl.maximum(b_begin, block.first).to(tl.int32)
    o_place = tl.cumsum(m_new.to(tl.int32), 0) - m_new.to(tl.int32)
    tl.store(memory.kept_begin + o_place, b_begin, mask=m_new)
    tl.store(memory.kept_end + o_place, b_end, mask=m_new)
    tl.store(memory.kept_score + o_i, tl.full([NODES], float("nan"), tl.float32))
    tl.debug_barrier()
    return tl.sum(m_new.to(tl.int32), 0)


@triton.jit
def largest_of(memory, count, NODES: tl.constexpr):
    o_node = tl.arange(0, NODES)
    b_begin = tl.load(memory.kept_begin + o_node, mask=o_node < count, other=0)
    b_end = tl.load(memory.kept_end + o_node, mask=o_node < count, other=0)
    return tl.max(b_end - b_begin, 0)


@triton.jit
def add_blocks(memory, kept, first, more, NODES: tl.constexpr):
    """Kept blocks, then `more` new ones from `first` on."""
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


@triton.jit(do_not_specialize=[*KEY_SIZES, *SIZES, "lists", "blocks"])
def hip_kernel(
    q,
    k,
    table,
    key_count,
    table_stride,
    page_size,
    pages,
    lengths,
    start,
    indices,
    counts,
    places,
    values,
    queries,
    block_q,
    stride_q,
    block_k,
    wanted,
    num_sink,
    num_recent,
    group,
    shared,
    restart_span,
    lists,
    blocks,
    REPRESENTATIVE: tl.constexpr,
    EXACT: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    keys = KeyRows(k.data, k.batch, k.seq, k.head, key_count, table, table_stride, page_size, pages)
    sizes = Sizes(queries, block_q, stride_q, block_k, wanted, num_sink, num_recent, group, shared,
                  restart_span)  # fmt: skip
    block = block_of(sizes, lengths, key_count, lists, blocks, CAUSAL)
    memory = memory_of(places, values, NODES)
    i = tl.program_id(0).to(tl.int64)
    o_node = tl.arange(0, NODES)
    count = tl.minimum(block.until - block.first, wanted)
    if block.until - block.first <= wanted:
        tl.store(memory.kept_begin + o_node, block.first + o_node)
        tl.debug_barrier()
    elif EXACT:
        count = count * 0
        for first in range(block.first, block.until, wanted):
            more = tl.minimum(wanted, block.until - first)
            add_blocks(memory, count, first, more, NODES)
            score_halves(q, keys, memory, block, sizes, more, REPRESENTATIVE, CAUSAL, DIM, BLOCK_M,
                         BLOCK_N, BLOCK_T, BLOCK_D)  # fmt: skip
            tl.debug_barrier()
            count = keep_best(memory, count + more, wanted, NODES)
    else:
        count = count * 0
        if start is not None:
            count = list_nodes(memory, start, block, sizes, NODES)
        if count == 0:
            start_nodes(memory, block, wanted, NODES)
            count = wanted + count
        largest = largest_of(memory, count, NODES)
        while largest > 1:
            halves, unknown = halve(memory, count, REPRESENTATIVE, NODES)
            if halves > wanted:
                score_halves(q, keys, memory, block, sizes, unknown, REPRESENTATIVE, CAUSAL, DIM,
                             BLOCK_M, BLOCK_N, BLOCK_T, BLOCK_D)  # fmt: skip
                tl.debug_barrier()
            count = keep_best(memory, halves, wanted, NODES)
            largest = largest_of(memory, count, NODES)
    b_found = tl.load(memory.kept_begin + o_node, mask=o_node < count, other=-1)
    tl.store(indices + i * wanted + o_node, b_found, mask=o_node < wanted)
    tl.store(counts + i, count)


def hip_block_select(
    q: Tensor,
    k: Tensor,
    budget: int,
    block_q: int,
    block_k: int,
    stride_q: int,
    representative: str,
    num_sink: int,
    num_recent: int,
    bound: str,
    start_indices: Tensor | None,
    start_counts: Tensor | None,
    restart_span: int,
    causal: bool,
    head_reduce: str,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    lists = heads if head_reduce == "none" else kv_heads
    group = heads // max(lists, 1)
    block_q = min(block_q, max(queries, 1))
    blocks, wanted = triton.cdiv(queries, block_q), budget // block_k
    indices = q.new_empty((batch, lists, blocks, wanted), dtype=torch.int32)
    counts = q.new_empty((batch, lists, blocks), dtype=torch.int32)
    programs = counts.numel()
    if heads == 0:  # nothing speaks for a list
        return indices.fill_(-1), counts.zero_()
    if programs == 0:
        return indices, counts
    sizes = key_sizes(k, block_table)
    most = sizes[0] + 1  # as good as any larger number of keys
    start = None
    if start_indices is not None and start_counts is not None:
        start = Lists(start_indices, start_counts, *start_indices.stride()[:3],
                      *start_counts.stride())  # fmt: skip
    nodes = max(triton.next_power_of_2(wanted), 16)
    places = q.new_empty((programs, 8 * nodes), dtype=torch.int32)
    values = q.new_empty((programs, 3 * nodes), dtype=torch.float32)
    block_t = min(triton.next_power_of_2(block_k), TILE_ROWS)
    block_d = min(max(triton.next_power_of_2(dim), 16), PIECE_BYTES // q.element_size())
    launch(
        hip_kernel, programs, q, Rows(q, *q.stride()[:3]), Rows(k, *k.stride()[:3]), block_table,
        *sizes, seqlens_k, start, indices, counts, places, values, queries, block_q, stride_q,
        block_k, wanted, min(num_sink, most), min(num_recent, most), group,
        max(lists // max(kv_heads, 1), 1), min(restart_span, most), lists, blocks,
        REPRESENTATIVE=REPRESENTATIVES[representative], EXACT=bound == "minmax", CAUSAL=causal,
        DIM=dim, NODES=nodes, BLOCK_M=16,
        BLOCK_N=TILE_ROWS // block_t, BLOCK_T=block_t, BLOCK_D=block_d,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return indices, counts
