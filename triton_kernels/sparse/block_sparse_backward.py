"""Gradients of block_sparse_attention, without atomics on floats: one kernel owns the queries and
walks along their lists, one the keys and walks along the transposed lists.

dz = P (dP - delta), delta = rowsum(dO O) - dlse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    Sequence,
    dot,
    head_of,
    launch,
    load_rows,
    load_tile,
    lower_bound,
    program,
    row_pointers,
    slice_of,
    store_rows,
    store_tile,
)
from ..dense.attention import Tiles
from ..dense.attention_backward import gradients, load_delta, load_lse, through_softcap
from ..dense.attention_decode import rows_of
from .block_sparse import (
    SIZES,
    Call,
    ends_of,
    find_keys,
    key_walk,
    length_of,
    query_tile,
    seen,
)
from .transpose_list import compacted, transposed


class QueryWalk(NamedTuple):
    """Rows of queries that see a tile of keys, numbered: those that see some as first or last keys,
    then those whose lists hold a block of the tile. Every query has a row for each head."""

    p_rows: Any
    p_bits: Any
    begin: Any  # first query of those that see some as first or last keys
    ends: Any  # how many rows they have
    listed: Any  # the lists begin here: whole tiles
    full: Any  # queries behind it see all keys of the tile: whole tiles
    total: Any


@triton.jit(do_not_specialize=SIZES)
def block_sparse_queries_kernel(
    dout,
    dlse,
    out,
    lse,
    delta,
    q,
    k,
    v,
    dq,
    lengths,
    ids,
    counts,
    list_heads,
    list_rows,
    entries,
    halvings,
    num_sink,
    num_recent,
    terms,
    seqlen_q,
    seqlen_k,
    row_heads,
    shared,
    tiles,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A tile of queries: dq and delta."""
    i_block, i_h, i_b = program(list_rows * tiles, row_heads)
    # The last queries see most keys under a causal mask: longest programs first.
    i_block = list_rows * tiles - 1 - i_block
    i_r = i_block // tiles
    length = length_of(lengths, seqlen_k, i_b)
    tile = query_tile(i_r, i_block % tiles, i_h, length, seqlen_q, GROUP, CAUSAL, BLOCK_Q, BLOCK_M)
    if tile.first >= seqlen_q:
        return
    walk = key_walk(
        ids, counts, list_heads, list_rows, entries, halvings, num_sink, num_recent, i_b,
        tl.minimum(i_h, list_heads - 1), i_r, tile, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    sequence = Sequence(0, seqlen_q, 0, length, length - seqlen_q)
    head = head_of(terms, i_b, i_h, length, False)
    keys = slice_of(k, i_b, i_h // shared, 0, length)
    values = slice_of(v, i_b, i_h // shared, 0, length)
    b_q = load_tile(row_pointers(q, i_b, tile.o_i, tile.o_h), tile.m_row, HEAD_DIM, BLOCK_D)
    p_dout = row_pointers(dout, i_b, tile.o_i, tile.o_h)
    b_dout = load_tile(p_dout, tile.m_row, VALUE_DIM, BLOCK_V)
    p_out = row_pointers(out, i_b, tile.o_i, tile.o_h)
    b_out = load_tile(p_out, tile.m_row, VALUE_DIM, BLOCK_V)
    o_head = (i_b * (row_heads * GROUP) + tile.o_h) * seqlen_q
    b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + o_head + tile.o_i, mask=tile.m_row, other=0.0)
    tl.store(delta + o_head + tile.o_i, b_delta, mask=tile.m_row)
    b_lse = load_lse(lse + o_head, tile.o_i, sequence, head)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    parts = (0, walk.full, walk.total)
    o_j = find_keys(walk, tl.arange(0, BLOCK_N), BLOCK_K)
    for PART in tl.static_range(2):
        for t in range(parts[PART], parts[PART + 1], BLOCK_N):
            o_t = t + tl.arange(0, BLOCK_N)
            b_k = load_rows(keys, o_j, HEAD_DIM, BLOCK_D)
            b_v = load_rows(values, o_j, VALUE_DIM, BLOCK_V)
            b_qk = dot(b_q, tl.trans(b_k))
            b_dp = dot(b_dout, tl.trans(b_v))
            m_seen = None
            if PART == 1:
                m_seen = seen(walk, t, o_t, o_j, tile.b_end, num_recent, CAUSAL)
            _, b_dz = gradients(
                b_qk,
                b_dp,
                tile.o_i[:, None],
                o_j[None, :],
                b_lse[:, None],
                b_delta[:, None],
                terms,
                head,
                sequence,
                m_seen,
                False,
                False,
            )
            b_dq += dot(through_softcap(b_dz, b_qk, terms), b_k)
            o_j = find_keys(walk, o_t + BLOCK_N, BLOCK_K)

    p_dq = row_pointers(dq, i_b, tile.o_i, tile.o_h)
    store_tile(p_dq, tile.m_row, b_dq * terms.scale, HEAD_DIM)


@triton.jit
def query_walk(
    offsets, rows, bits, wide, list_heads, list_rows, entries, halvings, num_sink, num_recent, i_b,
    i_list, first, length, seqlen_q,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the tile of keys that begins with the first."""
    last = tl.minimum(first + BLOCK_N, length) - 1
    # Queries begin .. end - 1 see some key as one of the first or of the last keys.
    begin = first - first
    end = tl.where(first < num_sink, seqlen_q, 0)
    # Rows of lists from some_row on see some key, from full_row on every key.
    some_row = begin
    full_row = begin
    if CAUSAL:
        diagonal = length - seqlen_q
        begin = tl.minimum(tl.maximum(first - diagonal, 0), seqlen_q)
        last_end = tl.minimum(last + num_recent - diagonal, seqlen_q)
        last_end = tl.where(num_recent == 0, begin, tl.maximum(last_end, begin))
        end = tl.where(first < num_sink, seqlen_q, last_end)
        behind = num_recent - diagonal
        some_row = tl.maximum(tl.maximum(first, num_sink) + behind, 0) // BLOCK_Q
        full_row = tl.cdiv(tl.maximum(first + BLOCK_N - 1 + behind, 0), BLOCK_Q)
    some_row = tl.where(last < num_sink, list_rows, some_row)
    full_row = tl.where((first < num_sink) | (first + BLOCK_N > length), list_rows, full_row)

    i_head = i_b * list_heads + i_list
    o_rows = i_head * list_rows * entries
    o_part = tl.arange(0, 2)
    p_offset = offsets + i_head * (wide + 1) + first // WIDTH + tl.zeros_like(o_part)
    b_first = tl.load(p_offset)
    b_last = tl.load(p_offset + 1)
    b_row = tl.where(o_part == 0, some_row, full_row)
    b_at = lower_bound(rows + o_rows, b_first, b_last, b_row, halvings)
    some_at = tl.sum(tl.where(o_part == 0, b_at, 0), 0)
    full_at = tl.maximum(tl.sum(tl.where(o_part == 1, b_at, 0), 0), some_at)
    last_at = tl.sum(tl.where(o_part == 0, b_last, 0), 0)

    ends = tl.where(first < length, (end - begin) * GROUP, 0)
    listed = tl.cdiv(ends, BLOCK_M) * BLOCK_M
    total = tl.where(first < length, listed + (last_at - some_at) * (BLOCK_Q * GROUP), 0)
    full = total
    p_bits = None
    if bits is None:
        full = tl.cdiv((full_at - some_at) * (BLOCK_Q * GROUP), BLOCK_M) * BLOCK_M
        full = tl.minimum(listed + full, total)
    else:
        p_bits = bits + o_rows + some_at
    return QueryWalk(rows + o_rows + some_at, p_bits, begin, ends, listed, full, total)


@triton.jit
def find_queries(walk, o_u, seqlen_q, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Queries of rows o_u, seqlen_q where there is none, and, where a tile has several blocks, bits
    of those that they list."""
    m_list = (o_u >= walk.listed) & (o_u < walk.total)
    o_query = tl.where(m_list, o_u - walk.listed, o_u) // GROUP
    o_entry = o_query // BLOCK_Q
    b_row = tl.load(walk.p_rows + o_entry, mask=m_list, other=0)
    b_bits = b_row
    if walk.p_bits is not None:
        b_bits = tl.load(walk.p_bits + o_entry, mask=m_list, other=0)
    o_i = tl.where(m_list, b_row * BLOCK_Q + o_query % BLOCK_Q, walk.begin + o_query)
    m_i = (m_list | (o_u < walk.ends)) & (o_i < seqlen_q)
    return tl.where(m_i, o_i, seqlen_q), b_bits


@triton.jit(do_not_specialize=SIZES)
def block_sparse_keys_kernel(
    dout,
    lse,
    delta,
    q,
    k,
    v,
    dk,
    dv,
    lengths,
    offsets,
    rows,
    bits,
    wide,
    list_heads,
    list_rows,
    entries,
    halvings,
    num_sink,
    num_recent,
    terms,
    seqlen_q,
    seqlen_k,
    row_heads,
    shared,
    tiles,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dk and dv of a tile of keys, summed over the query heads that read it. Scores are transposed:
    P^T and dz^T are the left operands of the products that follow."""
    i_tile, i_kv, i_b = program(tiles, row_heads // shared)
    first = i_tile * BLOCK_N
    length = length_of(lengths, seqlen_k, i_b)
    sequence = Sequence(0, seqlen_q, 0, length, length - seqlen_q)
    o_j = first + tl.arange(0, BLOCK_N)
    b_k = load_rows(slice_of(k, i_b, i_kv, 0, length), o_j, HEAD_DIM, BLOCK_D)
    b_v = load_rows(slice_of(v, i_b, i_kv, 0, length), o_j, VALUE_DIM, BLOCK_V)
    head = head_of(terms, i_b, i_kv, length, False)

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for i_h in range(i_kv * shared, i_kv * shared + shared):
        walk = query_walk(
            offsets, rows, bits, wide, list_heads, list_rows, entries, halvings, num_sink,
            num_recent, i_b, tl.minimum(i_h, list_heads - 1), first, length, seqlen_q,
            GROUP, CAUSAL, BLOCK_Q, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        parts = (0, walk.full, walk.total)
        # A step early: a query is found through a load, and loaded through others.
        o_i, b_bits = find_queries(walk, tl.arange(0, BLOCK_M), seqlen_q, GROUP, BLOCK_Q)
        for PART in tl.static_range(2 if bits is None else 1):
            for u in range(parts[PART], parts[PART + 1], BLOCK_M):
                o_u = u + tl.arange(0, BLOCK_M)
                ends = u < walk.listed
                o_h = i_h * GROUP + (o_u - tl.where(ends, 0, walk.listed)) % GROUP
                m_i = o_i < seqlen_q
                b_q = load_tile(row_pointers(q, i_b, o_i, o_h), m_i, HEAD_DIM, BLOCK_D)
                b_dout = load_tile(row_pointers(dout, i_b, o_i, o_h), m_i, VALUE_DIM, BLOCK_V)
                o_head = (i_b * (row_heads * GROUP) + o_h) * seqlen_q
                b_lse = load_lse(lse + o_head, o_i, sequence, head)
                b_delta = load_delta(delta + o_head, o_i, sequence)
                b_qk = dot(b_k, tl.trans(b_q))
                b_dp = dot(b_v, tl.trans(b_dout))
                m_seen = None
                if PART == 0:
                    b_end = ends_of(o_i, length, seqlen_q, CAUSAL)
                    b_end = tl.where(ends, b_end, b_end - num_recent)[None, :]
                    m_recent = ((o_j + num_recent)[:, None] >= b_end) & ends
                    m_seen = m_recent | ((o_j < num_sink) == ends)[:, None]
                    m_seen = m_seen & (o_j[:, None] < b_end)
                    if bits is not None:
                        b_own = tl.where(ends, -1, b_bits)
                        b_bit = b_own[None, :] >> ((o_j - first) // BLOCK_K)[:, None]
                        m_seen = m_seen & ((b_bit & 1) != 0)
                b_p, b_dz = gradients(
                    b_qk,
                    b_dp,
                    o_i[None, :],
                    o_j[:, None],
                    b_lse[None, :],
                    b_delta[None, :],
                    terms,
                    head,
                    sequence,
                    m_seen,
                    False,
                    False,
                )
                b_dv += dot(b_p, b_dout)
                b_dk += dot(through_softcap(b_dz, b_qk, terms), b_q)
                o_i, b_bits = find_queries(walk, o_u + BLOCK_M, seqlen_q, GROUP, BLOCK_Q)

    store_rows(slice_of(dk, i_b, i_kv, 0, seqlen_k), o_j, b_dk * terms.scale, HEAD_DIM)
    store_rows(slice_of(dv, i_b, i_kv, 0, seqlen_k), o_j, b_dv, VALUE_DIM)


def key_tiles(call: Call, tiles: Tiles) -> Tiles:
    """Small blocks lie together in tiles of 32 keys: in wider ones, queries that list few of the
    blocks would multiply by all of them."""
    return tiles._replace(block_n=min(tiles.block_n, max(call.block_k, 32)))


def block_sparse_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *lowered: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*lowered)
    seqlen_k = call.k.shape[1]
    dq = call.q.new_empty(call.q.shape)
    dk, dv = (t.new_empty(t.shape) for t in (call.k, call.v))
    if out.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    plan = call.plan()
    qkv = tuple(map(rows_of, (call.q, call.k, call.v)))
    delta = torch.empty_like(lse)
    launch(
        block_sparse_queries_kernel,
        call.programs(plan.queries),
        call.q,
        rows_of(dout),
        dlse,
        rows_of(out),
        lse,
        delta,
        *qkv,
        rows_of(dq),
        call.lengths,
        *call.lists(),
        *call.arguments(),
        call.query_tiles(plan.queries),
        **call.options(plan.queries),
    )
    tiles = key_tiles(call, plan.keys)
    width = max(tiles.block_n, call.block_k)
    wide_lists = compacted(call.indices, call.counts, call.key_blocks, width // call.block_k)
    offsets, rows, bits = transposed(wide_lists)
    list_heads, list_rows, entries = call.indices.shape[1:]
    blocks = triton.cdiv(seqlen_k, tiles.block_n)
    launch(
        block_sparse_keys_kernel,
        call.q.shape[0] * call.kv_heads * blocks,
        call.q,
        rows_of(dout),
        lse,
        delta,
        *qkv,
        rows_of(dk),
        rows_of(dv),
        call.lengths,
        offsets,
        rows,
        bits,
        wide_lists.wide,
        list_heads,
        list_rows,
        entries,
        list_rows.bit_length(),
        *call.arguments(),
        blocks,
        WIDTH=width,
        **call.options(tiles),
    )
    return dq, dk, dv
