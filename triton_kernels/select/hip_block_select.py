"""hip_block_select: a program searches for one query block. Its nodes are exchanged between threads
through per-program memory: halves, and the nodes that are kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill.select.rules import rows_of_request

from ..common import INF, Rows, dot, launch, span
from .hip_nodes import (
    add_blocks,
    halve,
    keep_best,
    largest_of,
    memory_of,
    representative,
)
from .keys import KEY_SIZES, KeyRows, key_sizes, length_of, load_keys

TILE_ROWS = 64  # keys per product
PIECE_BYTES = 128  # bytes of a row per step
REPRESENTATIVES = {"first": 0, "middle": 1, "last": 2}


class Lists(NamedTuple):
    """Block lists that the search starts from; strides in elements."""

    indices: Tensor
    counts: Tensor
    indices_batch: int
    indices_head: int
    indices_block: int
    counts_batch: int
    counts_head: int
    counts_block: int


class Block(NamedTuple):
    """Query block i_row of list i_list: its queries, which see keys from num_sink up to end (for
    the last query), and the range of admissible key blocks."""

    i_request: Any  # request of the lists
    i_list: Any
    i_row: Any
    i_b: Any
    q_start: Any  # row of the request's first query
    k_start: Any
    queries: Any  # queries of the request
    last: Any  # last query of the block
    columns: Any  # sampled queries of the block, over all heads
    rows: Any  # sampled queries per head
    length: Any
    end: Any
    first: Any
    until: Any


class Ends(NamedTuple):
    """int32 tensors, or None: query and key lengths of requests, and cumulative lengths if
    packed."""

    seqlens_q: Any
    seqlens_k: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any


class Sizes(NamedTuple):
    """Parameters of the search."""

    queries: Any  # per request; packed: total
    block_q: Any
    stride_q: Any
    block_k: Any
    wanted: Any
    num_sink: Any
    num_recent: Any
    group: Any  # query heads per list
    shared: Any  # lists per KV head
    restart_span: Any


SIZES = list(Sizes._fields)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def end_of(sizes, length, queries, o_query, CAUSAL: tl.constexpr):
    """Number of keys visible to a query: a prefix."""
    o_end = length - sizes.num_recent + o_query * 0
    if CAUSAL:
        o_end += o_query - queries + 1
    return o_end


@triton.jit
def find_sequence(cu_seqlens_q, batch, tokens, block_q, i_row):
    """Last sequence whose query blocks begin at or before row i_row."""
    low = i_row * 0
    high = low + batch
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + middle), 0), tokens)
        begun = start // block_q + middle <= i_row
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def block_of(sizes, ends, key_count, batch, lists, blocks, CAUSAL: tl.constexpr):
    i = tl.program_id(0)
    i_row = i % blocks
    i_list = i // blocks % lists
    i_request = (i // (blocks * lists)).to(tl.int64)
    i_b = i_request
    i_block = i_row
    if ends.cu_seqlens_q is not None:
        i_seq = find_sequence(ends.cu_seqlens_q, batch, sizes.queries, sizes.block_q, i_row)
        i_b = i_seq.to(tl.int64)
        q_start, queries = span(ends.cu_seqlens_q, sizes.queries, sizes.queries, i_b)
        i_block = i_row - (q_start // sizes.block_q + i_seq)
    else:
        q_start = i_row * 0
        queries = length_of(ends.seqlens_q, i_b, sizes.queries).to(tl.int32)
    k_start = i_row * 0
    length = length_of(ends.seqlens_k, i_b, key_count)
    if ends.cu_seqlens_k is not None:
        k_start, packed_length = span(ends.cu_seqlens_k, key_count, key_count, i_b)
        length = packed_length.to(tl.int64)
    begin = i_block * sizes.block_q
    last = tl.maximum(tl.minimum(begin + sizes.block_q, queries) - 1, 0)
    rows = tl.maximum(last - begin, 0) // sizes.stride_q + 1
    end = end_of(sizes, length, queries, last, CAUSAL)
    some = (end > sizes.num_sink) & (begin >= 0) & (begin < queries)
    first = tl.where(some, sizes.num_sink // sizes.block_k, 0)
    until = tl.where(some, (end + sizes.block_k - 1) // sizes.block_k, 0).to(tl.int32)
    return Block(i_request, i_list, i_row, i_b, q_start, k_start, queries, last, rows * sizes.group,
                 rows, length, end, first.to(tl.int32), until)  # fmt: skip


@triton.jit
def score_halves(q, keys, memory, block, sizes, count, REPRESENTATIVE: tl.constexpr,
                 CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Scores the first `count` halves of the todo list, BLOCK_N at a time and BLOCK_T keys per
    step."""
    o_bt = tl.arange(0, BLOCK_N * BLOCK_T)
    for i_n in range(0, count, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        o_half = tl.load(memory.todo + i_n + o_bt // BLOCK_T, mask=i_n + o_bt // BLOCK_T < count,
                         other=0)  # fmt: skip
        b_begin = tl.load(memory.half_begin + o_half)
        b_end = tl.load(memory.half_end + o_half)
        o_key = representative(b_begin, b_end, REPRESENTATIVE).to(tl.int64) * sizes.block_k
        m_n = i_n + o_bt // BLOCK_T < count
        b_max = tl.full([BLOCK_N], -INF, tl.float32)
        for i_t in range(0, sizes.block_k, BLOCK_T):
            o_in = i_t + o_bt % BLOCK_T
            o_t = o_key + o_in
            m_t = m_n & (o_in < sizes.block_k) & (o_t >= sizes.num_sink) & (o_t < block.end)
            for i_m in range(0, block.columns, BLOCK_M):
                o_m = i_m + tl.arange(0, BLOCK_M)
                m_m = o_m < block.columns
                o_query = block.last - o_m % block.rows * sizes.stride_q
                o_head = block.i_list * sizes.group + o_m // block.rows
                o_q = block.i_b * q.batch + (block.q_start + o_query).to(tl.int64) * q.seq
                o_q += o_head.to(tl.int64) * q.head
                b_z = tl.zeros([BLOCK_M, BLOCK_N * BLOCK_T], tl.float32)
                for i_d in tl.static_range(0, DIM, BLOCK_D):
                    o_d = i_d + tl.arange(0, BLOCK_D)
                    m_q = m_m[:, None] & (o_d < DIM)[None, :]
                    b_q = tl.load(q.data + o_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
                    b_k, _ = load_keys(keys, block.i_b, block.i_list // sizes.shared,
                                       block.k_start + o_t, m_t, o_d, o_d < DIM)  # fmt: skip
                    # S = Q K^T
                    b_z += dot(b_q, tl.trans(b_k))
                o_end = end_of(sizes, block.length, block.queries, o_query, CAUSAL)
                m_z = m_m[:, None] & m_t[None, :] & (o_t[None, :] < o_end[:, None])
                b_z = tl.where(m_z & (b_z == b_z), b_z, -INF)
                # max over queries and keys of each half
                b_tile = tl.reshape(tl.max(b_z, 0), [BLOCK_N, BLOCK_T])
                b_max = tl.maximum(b_max, tl.max(b_tile, 1))
        p_score = memory.half_score + tl.load(memory.todo + o_n, mask=o_n < count, other=0)
        tl.store(p_score, b_max, mask=o_n < count)


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
    """Groups of the ids of a list; -1 if not admissible."""
    b_id = tl.load(p_list + o_i, mask=(o_i >= 0) & (o_i < count), other=-1)
    return tl.where((b_id >= block.first) & (b_id < block.until), b_id // span, -1)


@triton.jit
def list_nodes(memory, lists, block, sizes, NODES: tl.constexpr):
    """Builds nodes from a list. An id begins a node if its group exceeds all earlier groups."""
    i_list = block.i_list.to(tl.int64)
    i_row = block.i_row.to(tl.int64)
    p_list = lists.indices + block.i_request * lists.indices_batch + i_list * lists.indices_head
    p_list += i_row * lists.indices_block
    p_count = lists.counts + block.i_request * lists.counts_batch + i_list * lists.counts_head
    count = tl.minimum(tl.load(p_count + i_row * lists.counts_block), sizes.wanted)
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


@triton.jit(do_not_specialize=[*KEY_SIZES, *SIZES, "batch", "lists", "blocks"])
def hip_kernel(
    q, k, table, key_count, table_stride, page_size, pages, ends, start, indices, counts, places,
    values, queries, block_q, stride_q, block_k, wanted, num_sink, num_recent, group, shared,
    restart_span, batch, lists, blocks,
    REPRESENTATIVE: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr,
    NODES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    keys = KeyRows(k.data, k.batch, k.seq, k.head, key_count, table, table_stride, page_size, pages)
    sizes = Sizes(queries, block_q, stride_q, block_k, wanted, num_sink, num_recent, group, shared,
                  restart_span)  # fmt: skip
    block = block_of(sizes, ends, key_count, batch, lists, blocks, CAUSAL)
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


def hip_block_select(a: Any) -> tuple[Tensor, Tensor]:
    heads, dim = a.q.shape[-2:]
    kv_heads = a.k.shape[-2]
    lists = heads if a.head_reduce == "none" else kv_heads
    group, wanted = heads // max(lists, 1), a.budget // a.block_k
    block_q = a.block_q
    if a.cu_seqlens_q is None:
        batch, queries = a.q.shape[:2]
        block_q = min(block_q, max(queries, 1))
        blocks = triton.cdiv(queries, block_q)
        rows: tuple[int, ...] = batch, lists, blocks
    else:
        batch, queries = len(a.cu_seqlens_q) - 1, len(a.q)
        blocks = queries // block_q + batch
        rows = lists, blocks
    indices = a.q.new_empty((*rows, wanted), dtype=torch.int32)
    counts = a.q.new_empty(rows, dtype=torch.int32)
    programs = counts.numel()
    if heads == 0 or batch == 0:  # no query heads vote for a list
        return indices.fill_(-1), counts.zero_()
    if programs == 0:
        return indices, counts
    packed_keys = a.cu_seqlens_k is not None
    sizes = (len(a.k), 0, 1, 0) if packed_keys else key_sizes(a.k, a.block_table)
    key_count = len(a.k) if packed_keys else rows_of_request(a.k, a.block_table)
    maximum = key_count + 1  # larger numbers of keys are equivalent
    start = None
    if a.start_indices is not None and a.start_counts is not None:
        start = Lists(a.start_indices, a.start_counts, *_strides(a.start_indices[..., 0]),
                      *_strides(a.start_counts))  # fmt: skip
    nodes = max(triton.next_power_of_2(wanted), 16)
    places = a.q.new_empty((programs, 8 * nodes), dtype=torch.int32)
    values = a.q.new_empty((programs, 3 * nodes), dtype=torch.float32)
    block_t = min(triton.next_power_of_2(a.block_k), TILE_ROWS)
    block_d = min(max(triton.next_power_of_2(dim), 16), PIECE_BYTES // a.q.element_size())
    ends = Ends(a.seqlens_q, a.seqlens_k, a.cu_seqlens_q, a.cu_seqlens_k)
    search = Sizes(
        queries, block_q, a.stride_q, a.block_k, wanted, min(a.num_sink, maximum),
        min(a.num_recent, maximum), group, max(lists // max(kv_heads, 1), 1),
        min(a.restart_span, maximum),
    )  # fmt: skip
    q_rows, k_rows = (Rows(t, *_strides(t[..., 0])) for t in (a.q, a.k))
    launch(
        hip_kernel, programs, a.q, q_rows, k_rows, a.block_table, *sizes, ends, start, indices,
        counts, places, values, *search, batch, lists, blocks,
        REPRESENTATIVE=REPRESENTATIVES[a.representative], EXACT=a.bound == "minmax",
        CAUSAL=a.causal, DIM=dim, NODES=nodes, BLOCK_M=16, BLOCK_N=TILE_ROWS // block_t,
        BLOCK_T=block_t, BLOCK_D=block_d, num_warps=8, num_stages=2,
    )  # fmt: skip
    return indices, counts


def _strides(t: Tensor) -> tuple[int, ...]:
    """Strides of [B, x, y], or of packed [x, y] with 0 for B."""
    return (0,) * (3 - t.dim()) + t.stride()
