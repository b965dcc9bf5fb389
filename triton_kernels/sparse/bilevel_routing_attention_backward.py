"""Gradients of bilevel_routing_attention, without atomics: one kernel owns the queries of a region
and iterates over its list; one owns the keys of one region, or of several small regions, and
iterates over the transposed lists.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._call.operator import as_record

from ..common import head_of, launch, load_rows, program, slice_of, store_rows
from .bilevel_routing_attention import SIZES, Call, map_rows
from .listed import Statistics, add_key_gradients, query_gradients
from .regions import grid_of, pixel_key_tile, pixel_keys, pixel_queries, pixel_tile
from .transpose_block_list import transposed


@triton.jit(do_not_specialize=SIZES)
def bilevel_routing_queries_kernel(
    dout,
    dlse,
    out,
    lse,
    delta,
    q,
    k,
    v,
    dq,
    ids,
    counts,
    list_heads,
    list_rows,
    entries,
    q_height,
    q_width,
    q_region_height,
    q_region_width,
    by_q_pixels,
    by_q_width,
    k_height,
    k_width,
    k_region_height,
    k_region_width,
    by_k_pixels,
    by_k_width,
    by_columns,
    terms,
    row_heads,
    shared,
    tiles,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dq and delta of a tile of queries."""
    i_block, i_h, i_b = program(list_rows * tiles, row_heads)
    i_r = i_block // tiles
    queries = grid_of(
        q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width, by_columns
    )  # fmt: skip
    tile = pixel_tile(queries, i_r, i_block % tiles, i_h, GROUP, BLOCK_M)
    if tile.left <= 0:
        return
    i_row = (i_b * list_heads + tl.minimum(i_h, list_heads - 1)) * list_rows + i_r
    keys = grid_of(
        k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns
    )  # fmt: skip
    walk = pixel_keys(keys, ids + i_row * entries, tl.load(counts + i_row), BLOCK_N)
    head = head_of(terms, i_b, i_h, 1)
    statistics = Statistics(row_heads * GROUP, q_height * q_width, q_width)
    query_gradients(
        dout, dlse, out, lse, delta, q, k, v, dq, statistics, tile, walk, terms, head, i_b,
        i_h // shared, HEAD_DIM, VALUE_DIM, False, 1, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "factor"])
def bilevel_routing_keys_kernel(
    dout,
    lse,
    delta,
    q,
    k,
    v,
    dk,
    dv,
    offsets,
    rows,
    bits,
    wide,
    factor,
    list_heads,
    list_rows,
    entries,
    q_height,
    q_width,
    q_region_height,
    q_region_width,
    by_q_pixels,
    by_q_width,
    k_height,
    k_width,
    k_region_height,
    k_region_width,
    by_k_pixels,
    by_k_width,
    by_columns,
    terms,
    row_heads,
    shared,
    tiles,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dk and dv of a tile of keys, summed over the query heads that read it. A tile is cut from the
    concatenated pixels of `factor` regions."""
    i_block, i_kv, i_b = program(wide * tiles, row_heads // shared)
    i_wide = i_block // tiles
    keys = grid_of(
        k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns
    )  # fmt: skip
    tile = pixel_key_tile(keys, i_wide * factor, factor, i_block % tiles, BLOCK_N)
    b_k = load_rows(slice_of(k, i_b, i_kv, 0, tile.end), tile.o_j, HEAD_DIM, BLOCK_D)
    b_v = load_rows(slice_of(v, i_b, i_kv, 0, tile.end), tile.o_j, VALUE_DIM, BLOCK_V)
    head = head_of(terms, i_b, i_kv, 1)
    queries = grid_of(
        q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width, by_columns
    )  # fmt: skip
    statistics = Statistics(row_heads * GROUP, q_height * q_width, q_width)

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for i_h in range(i_kv * shared, i_kv * shared + shared):
        i_list = i_b * list_heads + tl.minimum(i_h, list_heads - 1)
        walk = pixel_queries(
            queries, offsets, rows, bits, i_list, wide, i_wide, list_rows * entries, GROUP
        )
        b_dk, b_dv = add_key_gradients(
            b_dk, b_dv, b_k, b_v, dout, lse, delta, q, statistics, tile, walk, terms, head, i_b,
            i_h, GROUP, HEAD_DIM, VALUE_DIM, False, 1, BLOCK_M, BLOCK_D, BLOCK_V,
        )  # fmt: skip

    store_rows(slice_of(dk, i_b, i_kv, 0, tile.end), tile.o_j, b_dk * terms.scale, HEAD_DIM)
    store_rows(slice_of(dv, i_b, i_kv, 0, tile.end), tile.o_j, b_dv, VALUE_DIM)


def bilevel_routing_attention_backward(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call._make(as_record("bilevel_routing_attention", a))
    listed = call.listed
    dq, dk, dv = (t.new_empty(t.shape) for t in (call.q, call.k, call.v))
    if a.out.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    plan = call.plan()
    qkv = tuple(map(map_rows, (call.q, call.k, call.v)))
    delta = torch.empty_like(a.lse)
    lists = listed.compacted()
    launch(
        bilevel_routing_queries_kernel,
        listed.programs(plan.queries),
        call.q,
        map_rows(a.dout),
        a.dlse,
        map_rows(a.out),
        a.lse,
        delta,
        *qkv,
        map_rows(dq),
        lists.ids,
        lists.counts,
        *call.indices.shape[1:],
        *call.arguments(),
        listed.query_tiles(plan.queries),
        **listed.options(plan.queries),
    )
    factor = listed.factor(plan.keys)
    wide_lists = listed.compacted(factor)
    offsets, rows, bits = transposed(wide_lists)
    tiles = triton.cdiv(listed.keys, plan.keys.block_n)
    launch(
        bilevel_routing_keys_kernel,
        call.q.shape[0] * listed.kv_heads * wide_lists.wide * tiles,
        call.q,
        map_rows(a.dout),
        a.lse,
        delta,
        *qkv,
        map_rows(dk),
        map_rows(dv),
        offsets,
        rows,
        bits,
        wide_lists.wide,
        factor,
        *call.indices.shape[1:],
        *call.arguments(),
        tiles,
        **listed.options(plan.keys),
    )
    return dq, dk, dv
