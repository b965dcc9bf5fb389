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
from .bilevel_routing_attention import SIZES, Call, map_rows, region_keys
from .listed import Statistics, add_key_gradients, query_gradients
from .regions import grid_of, grids_of, pixel_key_tile, pixel_queries, pixel_tile
from .transpose_block_list import transposed


@triton.jit(do_not_specialize=SIZES)
def bilevel_routing_queries_kernel(
    dout, dlse, out, lse, delta, q, k, v, dq, ids, counts, terms,
    q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width,
    k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns,
    list_heads, list_rows, entries, row_heads, shared, tiles, shape,
):  # fmt: skip
    """dq and delta of a tile of queries."""
    i_block, i_h, i_b = program(list_rows * tiles, row_heads)
    i_r = i_block // tiles
    queries = grid_of(
        q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width, by_columns
    )
    tile = pixel_tile(queries, i_r, i_block % tiles, i_h, shape.GROUP, shape.BLOCK_M)
    if tile.left <= 0:
        return
    keys = grid_of(
        k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns
    )
    walk, _ = region_keys(keys, ids, counts, list_heads, list_rows, entries, i_b, i_h, i_r, shape)
    head = head_of(terms, i_b, i_h, 1)
    statistics = Statistics(row_heads * shape.GROUP, q_height * q_width, q_width)
    query_gradients(
        dout, dlse, out, lse, delta, q, k, v, dq, statistics, tile, walk, terms, head, i_b,
        i_h // shared, shape,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "wide", "factor"])
def bilevel_routing_keys_kernel(
    dout, lse, delta, q, k, v, dk, dv, lists, wide, factor, terms,
    q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width,
    k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns,
    list_heads, list_rows, entries, row_heads, shared, tiles, shape,
):  # fmt: skip
    """dk and dv of a tile of keys, summed over the query heads that read it. A tile is cut from the
    concatenated pixels of `factor` regions."""
    queries, keys = grids_of(
        q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width,
        k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns,
    )  # fmt: skip
    i_block, i_kv, i_b = program(wide * tiles, row_heads // shared)
    i_wide = i_block // tiles
    tile = pixel_key_tile(keys, i_wide * factor, factor, i_block % tiles, shape.BLOCK_N)
    keys_of_head = slice_of(k, i_b, i_kv, 0, tile.end)
    values = slice_of(v, i_b, i_kv, 0, tile.end)
    b_k = load_rows(keys_of_head, tile.o_j, shape.HEAD_DIM, shape.BLOCK_D)
    b_v = load_rows(values, tile.o_j, shape.VALUE_DIM, shape.BLOCK_V)
    head = head_of(terms, i_b, i_kv, 1)
    statistics = Statistics(row_heads * shape.GROUP, q_height * q_width, q_width)

    b_dk = tl.zeros([shape.BLOCK_N, shape.BLOCK_D], tl.float32)
    b_dv = tl.zeros([shape.BLOCK_N, shape.BLOCK_V], tl.float32)
    for i_h in range(i_kv * shared, i_kv * shared + shared):
        i_list = i_b * list_heads + tl.minimum(i_h, list_heads - 1)
        walk = pixel_queries(queries, lists, i_list, wide, i_wide, list_rows * entries, shape.GROUP)
        b_dk, b_dv = add_key_gradients(
            b_dk, b_dv, b_k, b_v, dout, lse, delta, q, statistics, tile, walk, terms, head, i_b,
            i_h, shape,
        )  # fmt: skip

    store_rows(slice_of(dk, i_b, i_kv, 0, tile.end), tile.o_j, b_dk * terms.scale, shape.HEAD_DIM)
    store_rows(slice_of(dv, i_b, i_kv, 0, tile.end), tile.o_j, b_dv, shape.VALUE_DIM)


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
        bilevel_routing_queries_kernel, listed.programs(plan.queries), call.q, map_rows(a.dout),
        a.dlse, map_rows(a.out), a.lse, delta, *qkv, map_rows(dq), lists.ids, lists.counts,
        call.terms(), *call.sizes(), listed.query_tiles(plan.queries),
        **listed.options(plan.queries),
    )  # fmt: skip
    factor = listed.factor(plan.keys)
    wide_lists = listed.compacted(factor)
    tiles = triton.cdiv(listed.keys, plan.keys.block_n)
    launch(
        bilevel_routing_keys_kernel, call.q.shape[0] * listed.kv_heads * wide_lists.wide * tiles,
        call.q, map_rows(a.dout), a.lse, delta, *qkv, map_rows(dk), map_rows(dv),
        transposed(wide_lists), wide_lists.wide, factor, call.terms(), *call.sizes(), tiles,
        **listed.options(plan.keys),
    )  # fmt: skip
    return dq, dk, dv
