"""Attention mass of each list entry of block_sparse_attention: one program owns keys of one list
and streams over the rows that read it, recomputing their scores.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    INTERPRETED,
    dot,
    head_of,
    launch,
    load_tile,
    row_pointers,
    scores,
    slice_of,
)
from ..dense.attention_backward import load_lse
from ..dense.attention_decode_merge import rows_of
from .blocks import PAGE_SIZES, Sizes, query_tile, request_of, rows_from
from .listed import Statistics, load_keys, pages_of, statistics_at

SIZES = [*Sizes._fields, *PAGE_SIZES, "heads", "row_tiles", "tiles", "indices_batch"]
SIZES += ["indices_head", "indices_row", "counts_batch", "counts_head", "counts_row"]


@triton.jit(do_not_specialize=SIZES)
def block_sparse_mass_kernel(
    q, k, lse, mass, table, table_stride, page_count, page_size, ends, indices, largest, counts,
    indices_batch, indices_head, indices_row, counts_batch, counts_head, counts_row, terms,
    requests, seqlen_q, seqlen_k, num_sink, num_recent, list_heads, list_rows, entries, row_heads,
    shared, heads, row_tiles, tiles, shape,
):  # fmt: skip
    """Mass of BLOCK_N keys of a list. largest: running maximum of the list's ids. heads: row heads
    per list."""
    sizes = Sizes(requests, seqlen_q, seqlen_k, num_sink, num_recent, list_heads, list_rows,
                  entries, row_heads, shared)  # fmt: skip
    i_row = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    i_r = i_row % list_rows
    i_list = i_row // list_rows % list_heads
    i_b = (i_row // list_rows // list_heads).to(tl.int64)
    x = request_of(ends, sizes, i_b, i_r, shape)
    length = x.length
    p_list = indices + i_b * indices_batch + i_list.to(tl.int64) * indices_head
    p_list += i_r.to(tl.int64) * indices_row
    p_count = counts + i_b * counts_batch + i_list.to(tl.int64) * counts_head
    count = tl.load(p_count + i_r.to(tl.int64) * counts_row)

    o_t = i_tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
    o_e = o_t // shape.BLOCK_K
    o_list = i_row.to(tl.int64) * entries
    m_e = (o_e < entries) & (o_e < count)
    b_id = tl.load(p_list + o_e, mask=m_e, other=-1)
    b_before = tl.load(largest + o_list + o_e - 1, mask=m_e & (o_e > 0), other=-1)
    m_key = (b_id > tl.maximum(b_before, -1)) & (b_id < tl.cdiv(seqlen_k, shape.BLOCK_K))
    o_j = tl.where(m_key, b_id, 0) * shape.BLOCK_K + o_t % shape.BLOCK_K
    m_key = m_key & (o_j >= num_sink) & (o_j < length)
    o_j = tl.where(m_key, o_j, seqlen_k)

    pages = pages_of(table, table_stride, page_count, page_size, x.i_b)
    if ends.q is not None:
        q = rows_from(q, i_b, x.q_start)
        lse += x.q_start
        if table is None:
            k = rows_from(k, x.i_b, x.k_start)
    statistics = Statistics(row_heads * shape.GROUP, seqlen_q)
    b_mass = tl.zeros([shape.BLOCK_N], tl.float32)
    for i_h in range(i_list * heads, i_list * heads + heads):
        head = head_of(terms, i_b, i_h, length)
        keys = slice_of(k, i_b, i_h // shared, 0, seqlen_k)
        if pages is not None:
            keys = slice_of(k, 0, i_h // shared, 0, seqlen_k)
        b_k = load_keys(keys, k.batch, pages, o_j, shape.HEAD_DIM, shape.BLOCK_D)
        for i in range(row_tiles):
            tile = query_tile(x, i, i_h, shape)
            p_q = row_pointers(q, i_b, tile.o_i, tile.o_h)
            b_q = load_tile(p_q, tile.m_row, shape.HEAD_DIM, shape.BLOCK_D)
            o_row = statistics_at(statistics, i_b, tile.o_i, tile.o_h)
            b_lse = load_lse(lse + o_row, tile.m_row, head)
            # S = Q K^T
            b_qk = dot(b_q, tl.trans(b_k))
            b_z = scores(b_qk, tile.o_i[:, None], o_j[None, :], terms, head, None)
            m_seen = tile.m_row[:, None] & m_key[None, :]
            if shape.CAUSAL:
                m_seen = m_seen & ((o_j + num_recent)[None, :] < tile.b_end[:, None])
            # mass += column sums of P = exp2(z - lse)
            b_mass += tl.sum(tl.where(m_seen, tl.exp2(b_z - b_lse[:, None]), 0.0), 0)

    ENTRIES: tl.constexpr = shape.BLOCK_N // shape.BLOCK_K
    b_sum = tl.sum(tl.reshape(b_mass, [ENTRIES, shape.BLOCK_K]), 1)
    o_out = i_tile * ENTRIES + tl.arange(0, ENTRIES)
    tl.store(mass + o_list + o_out, b_sum, mask=o_out < entries)


def mass_of(call: Any, lse: Tensor) -> Tensor:
    """Mass [B, heads, rows, K] in the shape of the lists, from the lse of the forward pass."""
    listed = call.listed
    indices, counts = call.lists
    lists, list_rows, entries = indices.shape[1:]
    mass = lse.new_empty(call.indices.shape)
    if mass.numel() == 0 or lse.numel() == 0 or call.requests == 0:
        return mass.zero_()
    tiles = listed.plan().queries
    row_tiles = listed.query_tiles(tiles)
    block_n = max(1024 if INTERPRETED.value else min(tiles.block_n, 64), call.block_k)
    parts = triton.cdiv(entries * call.block_k, block_n)
    launch(
        block_sparse_mass_kernel, indices.shape[0] * lists * list_rows * parts, call.q,
        *map(rows_of, (call.q, call.k)), lse, mass, *call.pages, call.ends, indices,
        indices.cummax(-1).values.contiguous(), counts, *indices.stride()[:3], *counts.stride(),
        call.terms(), *call.sizes(), listed.row_heads // lists, row_tiles, parts,
        **call.options(tiles._replace(block_n=block_n)),
    )  # fmt: skip
    return mass
