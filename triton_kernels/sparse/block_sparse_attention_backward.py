"""Gradients of block_sparse_attention, without atomics on floats: one kernel owns the queries and
walks along their lists, one the keys and walks along the transposed lists.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._check import fail

from ..common import head_of, launch, load_rows, program, slice_of, store_rows
from ..dense.attention import sink_terms
from ..dense.attention_decode_merge import rows_of
from .block_sparse_attention import SIZES, Call
from .blocks import key_walk, length_of, query_tile, query_walk
from .listed import KeyTile, Statistics, add_key_gradients, query_gradients
from .transpose_block_list import transposed


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
        tl.minimum(i_h, list_heads - 1), i_r, tile, length, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    head = head_of(terms, i_b, i_h, length)
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
    first = i_tile * BLOCK_N
    length = length_of(lengths, seqlen_k, i_b)
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
            num_recent, i_b, tl.minimum(i_h, list_heads - 1), first, length, seqlen_q,
            GROUP, CAUSAL, BLOCK_Q, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        b_dk, b_dv = add_key_gradients(
            b_dk, b_dv, b_k, b_v, dout, lse, delta, q, statistics, tile, walk, terms, head, i_b,
            i_h, GROUP, HEAD_DIM, VALUE_DIM, CAUSAL, BLOCK_Q, BLOCK_M, BLOCK_D, BLOCK_V,
        )  # fmt: skip

    store_rows(slice_of(dk, i_b, i_kv, 0, seqlen_k), o_j, b_dk * terms.scale, HEAD_DIM)
    store_rows(slice_of(dv, i_b, i_kv, 0, seqlen_k), o_j, b_dv, VALUE_DIM)


def block_sparse_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs_dsink: bool,
    *lowered: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*lowered)
    if call.cu_seqlens_q is not None:
        rule = "must be None for gradients on CUDA"
        fail("block_sparse_attention", "cu_seqlens_q", rule, call.cu_seqlens_q.shape)
    listed = call.listed
    seqlen_k = call.k.shape[1]
    dq = call.q.new_empty(call.q.shape)
    dk, dv = (t.new_empty(t.shape) for t in (call.k, call.v))
    sink = call.sink if needs_dsink else None
    dsink = lse.new_zeros(0 if sink is None else lse.shape[:2])
    if out.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), dsink
    plan = listed.plan()
    qkv = tuple(map(rows_of, (call.q, call.k, call.v)))
    delta = torch.empty_like(lse)
    lists = listed.compacted()
    list_heads, list_rows, entries = call.indices.shape[1:]
    launch(
        block_sparse_queries_kernel,
        listed.programs(plan.queries),
        call.q,
        rows_of(dout),
        dlse,
        rows_of(out),
        lse,
        delta,
        *qkv,
        rows_of(dq),
        call.lengths,
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
    blocks = triton.cdiv(seqlen_k, plan.keys.block_n)
    launch(
        block_sparse_keys_kernel,
        call.q.shape[0] * listed.kv_heads * blocks,
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
        **call.options(plan.keys),
    )
    if sink is not None:
        dsink = sink_terms(lse, delta, sink).sum(2)
    return dq, dk, dv, dsink
