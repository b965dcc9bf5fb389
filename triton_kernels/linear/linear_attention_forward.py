"""Output of a chunk: its own pairs of tokens, and the incoming state.

A later value has weight 0, but 0 times a non-finite value is NaN. The first kernel flags each tile
that has a NaN row, and the second recomputes such rows without the values that they do not see.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import rows_of_nan
from .common import (
    LENGTHS,
    between,
    from_start,
    load_features,
    load_normalizer,
    load_state,
    load_tile,
    product,
    products_of_features,
    program_of,
    remains_of,
    rows_of,
    scale_beside,
    state_of,
    statistic_pointers,
    store_tile,
    weights,
)

EPSILON = tl.constexpr(1e-6)
TILES_AGAIN = tl.constexpr(32)  # tiles per program of the second kernel


@triton.jit
def before_values(inputs, states, decay_batch, chunk, i_h, group, o_c, form):
    """Output from the incoming state, weights of the chunk's own pairs, and the normalizer."""
    o_t = tl.arange(0, form.BLOCK_T)
    o_row = chunk.first + o_t
    remains = remains_of(inputs.decay, decay_batch, chunk, i_h, o_t)
    queries = rows_of(inputs.q, chunk, i_h)
    keys = rows_of(inputs.k, chunk, i_h // group)
    p_state = state_of(states, chunk, i_h, form)

    b_y = tl.zeros([form.BLOCK_T, form.BLOCK_V], tl.float32)
    b_z = tl.zeros([form.BLOCK_T], tl.float32)
    for f in range(0, form.FEATURES, form.BLOCK_F):
        o_f = f + tl.arange(0, form.BLOCK_F)
        # y += phi(q) S
        b_q = load_features(queries, o_row, o_f, inputs.scale, True, form)
        b_state = load_state(p_state, o_f, o_c, form)
        b_y += product(b_q, b_state, form.PRECISION)
        if form.COLUMNS > form.VALUE_DIM:
            b_column = load_normalizer(p_state, o_f, form)
            b_z += tl.sum(b_q.to(tl.float32) * b_column[None, :], 1)
    b_start = from_start(remains, o_t) * scale_beside(inputs.scale, form.MAP)
    b_y *= b_start[:, None]

    # W = phi(Q) phi(K)^T, times decay
    b_w = products_of_features(queries, keys, o_row, form)
    b_w = weights(b_w, inputs.scale, form.MAP) * between(remains, o_t, False, False)
    b_w = tl.where(o_t[:, None] >= o_t[None, :], b_w, 0.0)  # clears NaN and inf above the diagonal
    if form.COLUMNS > form.VALUE_DIM:
        b_z = b_z * b_start + tl.sum(b_w, 1) + EPSILON
    return b_y, b_w, b_z


@triton.jit(do_not_specialize=LENGTHS)
def results_kernel(
    inputs, states, out, normalizer, nan, decay_batch, tokens, sequences, per_sequence, halvings,
    heads, group, tiles, form,
):  # fmt: skip
    i = tl.program_id(0)
    chunk, i_h, i_tile = program_of(
        i, inputs, tokens, sequences, per_sequence, halvings, heads, heads, tiles, form
    )
    if chunk.count <= 0:
        tl.store(nan + i, 0)
        return
    o_t = tl.arange(0, form.BLOCK_T)
    o_row = chunk.first + o_t
    o_c = i_tile * form.BLOCK_V + tl.arange(0, form.BLOCK_V)
    b_y, b_w, b_z = before_values(inputs, states, decay_batch, chunk, i_h, group, o_c, form)
    values = rows_of(inputs.v, chunk, i_h // group)
    # y += W V
    b_y += product(b_w, load_tile(values, o_row, o_c, form.VALUE_DIM), form.PRECISION)
    if form.COLUMNS > form.VALUE_DIM:
        b_y = b_y / b_z[:, None]
        if i_tile == 0:
            p_z = statistic_pointers(normalizer, chunk, i_h, o_t)
            tl.store(p_z, b_z, mask=o_t < chunk.count)
    store_tile(rows_of(out, chunk, i_h), o_row, o_c, b_y, form.VALUE_DIM)
    tl.store(nan + i, tl.max(rows_of_nan(b_y).to(tl.int32), 0))


@triton.jit(do_not_specialize=LENGTHS)
def results_again_kernel(
    inputs, states, out, nan, programs, decay_batch, tokens, sequences, per_sequence, halvings,
    heads, group, tiles, form,
):  # fmt: skip
    first = tl.program_id(0) * TILES_AGAIN
    last = tl.minimum(first + TILES_AGAIN, programs)
    o_i = first + tl.arange(0, TILES_AGAIN)
    if tl.max(tl.load(nan + o_i, mask=o_i < last, other=0), 0) == 0:
        return
    o_t = tl.arange(0, form.BLOCK_T)
    for i in tl.range(first, last, num_stages=1):
        if tl.load(nan + i) != 0:
            chunk, i_h, i_tile = program_of(
                i, inputs, tokens, sequences, per_sequence, halvings, heads, heads, tiles, form
            )
            o_c = i_tile * form.BLOCK_V + tl.arange(0, form.BLOCK_V)
            b_y, b_w, b_z = before_values(inputs, states, decay_batch, chunk, i_h, group, o_c, form)
            values = rows_of(inputs.v, chunk, i_h // group)
            # y += W V over visible pairs
            for j in tl.range(0, chunk.count, num_stages=1):
                b_wj = tl.sum(tl.where(o_t[None, :] == j, b_w, 0.0), 1)
                b_vj = load_tile(values, chunk.first + j + tl.arange(0, 1), o_c, form.VALUE_DIM)
                b_wv = b_wj[:, None] * b_vj.to(tl.float32)
                b_y += tl.where((o_t >= j)[:, None], b_wv, 0.0)
            if form.COLUMNS > form.VALUE_DIM:
                b_y = b_y / b_z[:, None]
            outs = rows_of(out, chunk, i_h)
            o_row = chunk.first + o_t
            m_nan = rows_of_nan(load_tile(outs, o_row, o_c, form.VALUE_DIM).to(tl.float32))
            store_tile(outs, tl.where(m_nan, o_row, chunk.length), o_c, b_y, form.VALUE_DIM)
