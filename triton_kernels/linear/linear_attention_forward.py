"""Output of a chunk: its own pairs of tokens, and the incoming state.

A later value has weight 0, but 0 times a non-finite value is NaN. The first kernel flags each tile
that has a NaN row, and the second recomputes such rows without the values that they do not see.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import rows_of_nan, slice_of, statistics_of
from .common import (
    LENGTHS,
    between,
    chunk_of,
    from_start,
    load_features,
    load_normalizer,
    load_state,
    load_tile,
    product,
    products_of_rows,
    remains_of,
    scale_beside,
    store_tile,
    weights,
)

EPSILON = tl.constexpr(1e-6)
TILES_AGAIN = tl.constexpr(32)  # tiles per program of the second kernel


@triton.jit
def before_values(
    q, k, states, decay, decay_batch, scale, chunk, i_slot, i_h, heads, group, o_t, o_c,
    MAP: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    FEATURES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Output from the incoming state, weights of the chunk's own pairs, and the normalizer."""
    o_row = chunk.first + o_t
    remains = remains_of(decay, decay_batch, chunk, i_h, o_t)
    queries = slice_of(q, chunk.batch, i_h, chunk.start, chunk.length)
    keys = slice_of(k, chunk.batch, i_h // group, chunk.start, chunk.length)
    p_state = states + (tl.cast(i_slot, tl.int64) * heads + i_h) * (FEATURES * COLUMNS)

    b_y = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    b_z = tl.zeros([BLOCK_T], tl.float32)
    for f in range(0, FEATURES, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        # y += phi(q) S
        b_q = load_features(queries, o_row, o_f, scale, True, MAP, HEAD_DIM, FEATURES)
        b_state = load_state(p_state, o_f, o_c, FEATURES, VALUE_DIM, COLUMNS)
        b_y += product(b_q, b_state, PRECISION)
        if COLUMNS > VALUE_DIM:
            b_column = load_normalizer(p_state, o_f, FEATURES, COLUMNS)
            b_z += tl.sum(b_q.to(tl.float32) * b_column[None, :], 1)
    b_start = from_start(remains, o_t) * scale_beside(scale, MAP)
    b_y *= b_start[:, None]

    # W = phi(Q) phi(K)^T, times decay
    b_w = products_of_rows(queries, keys, o_row, MAP, PRECISION, HEAD_DIM, BLOCK_T, BLOCK_D)
    b_w = weights(b_w, scale, MAP) * between(remains, o_t, False, False)
    b_w = tl.where(o_t[:, None] >= o_t[None, :], b_w, 0.0)  # clears NaN and inf above the diagonal
    if COLUMNS > VALUE_DIM:
        b_z = b_z * b_start + tl.sum(b_w, 1) + EPSILON
    return b_y, b_w, b_z


@triton.jit(do_not_specialize=LENGTHS)
def results_kernel(
    q,
    k,
    v,
    out,
    normalizer,
    nan,
    states,
    decay,
    decay_batch,
    scale,
    cu_seqlens,
    tokens,
    sequences,
    per_sequence,
    halvings,
    heads,
    group,
    tiles,
    MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i = tl.program_id(0)
    i_tile = i % tiles
    i_h = i // tiles % heads
    i_slot = i // (tiles * heads)
    chunk = chunk_of(i_slot, cu_seqlens, tokens, sequences, per_sequence, halvings, BLOCK_T)
    if chunk.count <= 0:
        tl.store(nan + i, 0)
        return
    o_t = tl.arange(0, BLOCK_T)
    o_row = chunk.first + o_t
    o_c = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    b_y, b_w, b_z = before_values(
        q, k, states, decay, decay_batch, scale, chunk, i_slot, i_h, heads, group, o_t, o_c,
        MAP, PRECISION, HEAD_DIM, VALUE_DIM, FEATURES, COLUMNS, BLOCK_T, BLOCK_D, BLOCK_F, BLOCK_V,
    )  # fmt: skip
    values = slice_of(v, chunk.batch, i_h // group, chunk.start, chunk.length)
    # y += W V
    b_y += product(b_w, load_tile(values, o_row, o_c, VALUE_DIM), PRECISION)
    if COLUMNS > VALUE_DIM:
        b_y = b_y / b_z[:, None]
        if i_tile == 0:
            o_z = statistics_of(cu_seqlens, chunk.batch, i_h, heads, tokens, chunk.start)
            tl.store(normalizer + o_z + o_row, b_z, mask=o_t < chunk.count)
    outs = slice_of(out, chunk.batch, i_h, chunk.start, chunk.length)
    store_tile(outs, o_row, o_c, b_y, VALUE_DIM)
    tl.store(nan + i, tl.max(rows_of_nan(b_y).to(tl.int32), 0))


@triton.jit(do_not_specialize=LENGTHS)
def results_again_kernel(
    q,
    k,
    v,
    out,
    nan,
    programs,
    states,
    decay,
    decay_batch,
    scale,
    cu_seqlens,
    tokens,
    sequences,
    per_sequence,
    halvings,
    heads,
    group,
    tiles,
    MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first = tl.program_id(0) * TILES_AGAIN
    last = tl.minimum(first + TILES_AGAIN, programs)
    o_i = first + tl.arange(0, TILES_AGAIN)
    if tl.max(tl.load(nan + o_i, mask=o_i < last, other=0), 0) == 0:
        return
    o_t = tl.arange(0, BLOCK_T)
    for i in tl.range(first, last, num_stages=1):
        if tl.load(nan + i) != 0:
            i_tile = i % tiles
            i_h = i // tiles % heads
            i_slot = i // (tiles * heads)
            chunk = chunk_of(i_slot, cu_seqlens, tokens, sequences, per_sequence, halvings, BLOCK_T)
            o_c = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
            b_y, b_w, b_z = before_values(
                q, k, states, decay, decay_batch, scale, chunk, i_slot, i_h, heads, group, o_t, o_c,
                MAP, PRECISION, HEAD_DIM, VALUE_DIM, FEATURES, COLUMNS, BLOCK_T, BLOCK_D, BLOCK_F,
                BLOCK_V,
            )  # fmt: skip
            values = slice_of(v, chunk.batch, i_h // group, chunk.start, chunk.length)
            # y += W V over visible pairs
            for j in tl.range(0, chunk.count, num_stages=1):
                b_wj = tl.sum(tl.where(o_t[None, :] == j, b_w, 0.0), 1)
                b_vj = load_tile(values, chunk.first + j + tl.arange(0, 1), o_c, VALUE_DIM)
                b_wv = b_wj[:, None] * b_vj.to(tl.float32)
                b_y += tl.where((o_t >= j)[:, None], b_wv, 0.0)
            if COLUMNS > VALUE_DIM:
                b_y = b_y / b_z[:, None]
            outs = slice_of(out, chunk.batch, i_h, chunk.start, chunk.length)
            o_row = chunk.first + o_t
            m_nan = rows_of_nan(load_tile(outs, o_row, o_c, VALUE_DIM).to(tl.float32))
            store_tile(outs, tl.where(m_nan, o_row, chunk.length), o_c, b_y, VALUE_DIM)
