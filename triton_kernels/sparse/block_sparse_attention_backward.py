"""Gradients of block_sparse_attention, without float atomics: one kernel owns query tiles and
iterates over their lists, one owns key tiles and iterates over the transposed lists.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._call.operator import as_record

from ..common import head_of, launch, load_rows, program, slice_of, store_rows
from ..dense.attention import sink_terms
from ..dense.attention_decode_merge import rows_of
from .block_sparse_attention import SIZES, Call
from .blocks import key_tile_request, key_walk, query_tile, query_walk, request_of, rows_from
from .listed import KeyTile, Statistics, add_key_gradients, query_gradients
from .transpose_block_list import transposed

SIZES = [*SIZES, "requests"]


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
    ends_q,
    ends_k,
    requests,
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
    """dq and delta of a tile of queries."""
    i_block, i_h, i_b = program(list_rows * tiles, row_heads)
    # Reversed block order: under a causal mask the last queries have most keys, so they start
    # first.
    i_block = list_rows * tiles - 1 - i_block
    i_r = i_block // tiles
    x = request_of(
        ends_q, ends_k, requests, lengths, seqlen_q, seqlen_k, list_rows, i_b, i_r, BLOCK_Q
    )
    tile = query_tile(
        x.i_r, i_block % tiles, i_h, x.length, x.queries, GROUP, CAUSAL, BLOCK_Q, BLOCK_M
    )
    if tile.first >= x.queries:
        return
    walk = key_walk(
        ids, counts, list_heads, list_rows, entries, halvings, num_sink, num_recent, i_b,
        tl.minimum(i_h, list_heads - 1), i_r, tile, x.length, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    head = head_of(terms, i_b, i_h, x.length)
    if ends_q is not None:
        q, out = rows_from(q, i_b, x.q_start), rows_from(out, i_b, x.q_start)
        dq, dout = rows_from(dq, i_b, x.q_start), rows_from(dout, i_b, x.q_start)
        k, v = rows_from(k, x.i_b, x.k_start), rows_from(v, x.i_b, x.k_start)
        lse += x.q_start
        delta += x.q_start
        if dlse is not None:
            dlse += x.q_start
    statistics = Statistics(row_heads * GROUP, seqlen_q)
    query_gradients(
        dout, dlse, out, lse, delta, q, k, v, dq, statistics, tile, walk, terms, head, i_b,
        i_h // shared, HEAD_DIM, VALUE_DIM, CAUSAL, BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip


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
    ends_q,
    ends_k,
    requests,
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
    """dk and dv of a tile of keys, summed over the query heads that read it."""
    i_tile, i_kv, i_b = program(tiles, row_heads // shared)
    x = key_tile_request(
        ends_q, ends_k, requests, lengths, seqlen_q, seqlen_k, i_b, i_tile, BLOCK_Q, BLOCK_N
    )
    length = x.length
    first = x.i_tile * BLOCK_N
    if first >= x.keys:
        return
    if ends_q is not None:
        q, dout = rows_from(q, i_b - i_b, x.q_start), rows_from(dout, i_b - i_b, x.q_start)
        k, v = rows_from(k, x.i_b, x.k_start), rows_from(v, x.i_b, x.k_start)
        dk, dv = rows_from(dk, x.i_b, x.k_start), rows_from(dv, x.i_b, x.k_start)
        lse += x.q_start
        delta += x.q_start
        i_b = i_b - i_b
    o_j = first + tl.arange(0, BLOCK_N)
    tile = KeyTile(o_j, (o_j - first) // BLOCK_K)
    b_k = load_rows(slice_of(k, i_b, i_kv, 0, length), o_j, HEAD_DIM, BLOCK_D)
    b_v = load_rows(slice_of(v, i_b, i_kv, 0, length), o_j, VALUE_DIM, BLOCK_V)
    head = head_of(terms, i_b, i_kv, length)
    statistics = Statistics(row_heads * GROUP, seqlen_q)

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for i_h in range(i_kv * shared, i_kv * shared + shared):
        walk = query_walk(
            offsets, rows, bits, wide, list_heads, list_rows, entries, halvings, num_sink,
            num_recent, i_b, tl.minimum(i_h, list_heads - 1), first, length, x.queries, x.first_row,
            GROUP, CAUSAL, BLOCK_Q, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        b_dk, b_dv = add_key_gradients(
            b_dk, b_dv, b_k, b_v, dout, lse, delta, q, statistics, tile, walk, terms, head, i_b,
            i_h, GROUP, HEAD_DIM, VALUE_DIM, CAUSAL, BLOCK_Q, BLOCK_M, BLOCK_D, BLOCK_V,
        )  # fmt: skip

    store_rows(slice_of(dk, i_b, i_kv, 0, x.keys), o_j, b_dk * terms.scale, HEAD_DIM)
    store_rows(slice_of(dv, i_b, i_kv, 0, x.keys), o_j, b_dv, VALUE_DIM)


def block_sparse_attention_backward(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call._make(as_record("block_sparse_attention", a))
    listed = call.listed
    packed = call.cu_seqlens_q is not None
    dq = call.q.new_empty(call.q.shape)
    dk, dv = (t.new_empty(t.shape) for t in (call.k, call.v))
    sink = call.sink if a.needs_dsink else None
    requests = call.requests if packed else call.q.shape[0]
    dsink = a.lse.new_zeros(0 if sink is None else (requests, call.q.shape[-2]))
    delta = torch.empty_like(a.lse)
    if packed or a.out.numel() == 0:  # covers tokens outside all requests
        for t in (dq, dk, dv, delta):
            t.zero_()
    if a.out.numel() == 0 or requests == 0:
        return dq, dk, dv, dsink
    plan = listed.plan()
    qkv = tuple(map(rows_of, (call.q, call.k, call.v)))
    lists = listed.compacted()
    list_heads, list_rows, entries = listed.indices.shape[1:]
    launch(
        block_sparse_queries_kernel,
        listed.programs(plan.queries),
        call.q,
        rows_of(a.dout),
        a.dlse,
        rows_of(a.out),
        a.lse,
        delta,
        *qkv,
        rows_of(dq),
        *call.packed,
        call.seqlens_k,
        lists.ids,
        lists.counts,
        list_heads,
        list_rows,
        entries,
        entries.bit_length(),
        *call.arguments(),
        listed.query_tiles(plan.queries),
        **call.options(plan.queries),
    )
    width = max(plan.keys.block_n, call.block_k)
    wide_lists = listed.compacted(listed.factor(plan.keys))
    offsets, rows, bits = transposed(wide_lists)
    batch, blocks = 1 if call.k.dim() == 3 else call.k.shape[0], call.key_tiles(plan.keys.block_n)
    launch(
        block_sparse_keys_kernel,
        batch * listed.kv_heads * blocks,
        call.q,
        rows_of(a.dout),
        a.lse,
        delta,
        *qkv,
        rows_of(dk),
        rows_of(dv),
        *call.packed,
        call.seqlens_k,
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
        **call.options(plan.keys),
    )
    if sink is not None:
        terms = sink_terms(a.lse, delta, sink)
        if packed:
            dsink[:1] = terms.sum(1)  # sum over all requests
        else:
            dsink = terms.sum(2)
    return dq, dk, dv, dsink
