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
from .blocks import Sizes, key_tile_request, key_walk, listed_queries, query_walk, rows_from
from .listed import KeyTile, Statistics, add_key_gradients, query_gradients
from .transpose_block_list import transposed


@triton.jit(do_not_specialize=SIZES)
def block_sparse_queries_kernel(
    dout, dlse, out, lse, delta, q, k, v, dq, ends, ids, counts, terms, halvings, tiles, requests,
    seqlen_q, seqlen_k, num_sink, num_recent, list_heads, list_rows, entries, row_heads, shared,
    shape,
):  # fmt: skip
    """dq and delta of a tile of queries."""
    sizes = Sizes(requests, seqlen_q, seqlen_k, num_sink, num_recent, list_heads, list_rows,
                  entries, row_heads, shared)  # fmt: skip
    i_b, i_h, i_r, x, tile = listed_queries(ends, sizes, tiles, shape)
    if tile.first >= x.queries:
        return
    walk = key_walk(ids, counts, halvings, sizes, i_b, i_h, i_r, tile, x.length, shape)
    head = head_of(terms, i_b, i_h, x.length)
    if ends.q is not None:
        q, out = rows_from(q, i_b, x.q_start), rows_from(out, i_b, x.q_start)
        dq, dout = rows_from(dq, i_b, x.q_start), rows_from(dout, i_b, x.q_start)
        k, v = rows_from(k, x.i_b, x.k_start), rows_from(v, x.i_b, x.k_start)
        lse += x.q_start
        delta += x.q_start
        if dlse is not None:
            dlse += x.q_start
    statistics = Statistics(row_heads * shape.GROUP, seqlen_q)
    query_gradients(
        dout, dlse, out, lse, delta, q, k, v, dq, statistics, tile, walk, terms, head, i_b,
        i_h // shared, shape,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "wide"])
def block_sparse_keys_kernel(
    dout, lse, delta, q, k, v, dk, dv, ends, lists, wide, terms, halvings, tiles, requests,
    seqlen_q, seqlen_k, num_sink, num_recent, list_heads, list_rows, entries, row_heads, shared,
    WIDTH: tl.constexpr, shape,
):  # fmt: skip
    """dk and dv of a tile of keys, summed over the query heads that read it."""
    sizes = Sizes(requests, seqlen_q, seqlen_k, num_sink, num_recent, list_heads, list_rows,
                  entries, row_heads, shared)  # fmt: skip
    i_tile, i_kv, i_b = program(tiles, row_heads // shared)
    x = key_tile_request(ends, sizes, i_b, i_tile, shape)
    first = x.i_tile * shape.BLOCK_N
    if first >= x.keys:
        return
    if ends.q is not None:
        q, dout = rows_from(q, i_b - i_b, x.q_start), rows_from(dout, i_b - i_b, x.q_start)
        k, v = rows_from(k, x.i_b, x.k_start), rows_from(v, x.i_b, x.k_start)
        dk, dv = rows_from(dk, x.i_b, x.k_start), rows_from(dv, x.i_b, x.k_start)
        lse += x.q_start
        delta += x.q_start
        i_b = i_b - i_b
    o_j = first + tl.arange(0, shape.BLOCK_N)
    tile = KeyTile(o_j, (o_j - first) // shape.BLOCK_K)
    b_k = load_rows(slice_of(k, i_b, i_kv, 0, x.length), o_j, shape.HEAD_DIM, shape.BLOCK_D)
    b_v = load_rows(slice_of(v, i_b, i_kv, 0, x.length), o_j, shape.VALUE_DIM, shape.BLOCK_V)
    head = head_of(terms, i_b, i_kv, x.length)
    statistics = Statistics(row_heads * shape.GROUP, seqlen_q)

    b_dk = tl.zeros([shape.BLOCK_N, shape.BLOCK_D], tl.float32)
    b_dv = tl.zeros([shape.BLOCK_N, shape.BLOCK_V], tl.float32)
    for i_h in range(i_kv * shared, i_kv * shared + shared):
        walk = query_walk(lists, wide, halvings, sizes, x, i_b, i_h, WIDTH, shape)
        b_dk, b_dv = add_key_gradients(
            b_dk, b_dv, b_k, b_v, dout, lse, delta, q, statistics, tile, walk, terms, head, i_b,
            i_h, shape,
        )  # fmt: skip

    store_rows(slice_of(dk, i_b, i_kv, 0, x.keys), o_j, b_dk * terms.scale, shape.HEAD_DIM)
    store_rows(slice_of(dv, i_b, i_kv, 0, x.keys), o_j, b_dv, shape.VALUE_DIM)


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
    launch(
        block_sparse_queries_kernel, listed.programs(plan.queries), call.q, rows_of(a.dout),
        a.dlse, rows_of(a.out), a.lse, delta, *qkv, rows_of(dq), call.ends, lists.ids,
        lists.counts, call.terms(), call.indices.shape[-1].bit_length(),
        listed.query_tiles(plan.queries), *call.sizes(), **call.options(plan.queries),
    )  # fmt: skip
    wide_lists = listed.compacted(listed.factor(plan.keys))
    batch, blocks = 1 if call.k.dim() == 3 else call.k.shape[0], call.key_tiles(plan.keys.block_n)
    launch(
        block_sparse_keys_kernel, batch * listed.kv_heads * blocks, call.q, rows_of(a.dout), a.lse,
        delta, *qkv, rows_of(dk), rows_of(dv), call.ends, transposed(wide_lists), wide_lists.wide,
        call.terms(), call.indices.shape[-2].bit_length(), blocks, *call.sizes(),
        max(plan.keys.block_n, call.block_k), **call.options(plan.keys),
    )  # fmt: skip
    if sink is not None:
        terms = sink_terms(a.lse, delta, sink)
        if packed:
            dsink[:1] = terms.sum(1)  # sum over all requests
        else:
            dsink = terms.sum(2)
    return dq, dk, dv, dsink
