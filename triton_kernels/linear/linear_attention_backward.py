"""Gradients of one chunk, from its own pairs of tokens and from the states on both sides.

With y the sums before division by the normalizer z: dy = dout / z, and the normalizer column has
delta = -(dout . out) / z. dW is the gradient of pair weights, including decay; G is the gradient of
the outgoing state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import slice_of, statistics_of
from .common import (
    LENGTHS,
    between,
    chunk_of,
    derivative,
    fold_moments,
    from_start,
    load_features,
    load_mapped,
    load_normalizer,
    load_state,
    load_statistic,
    load_tile,
    product,
    products_of_rows,
    remains_of,
    store_tile,
    to_end,
    weights,
)


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(
    dout,
    out,
    normalizer,
    delta,
    cu_seqlens,
    tokens,
    sequences,
    per_sequence,
    halvings,
    heads,
    VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_h = tl.program_id(0) % heads
    i_slot = tl.program_id(0) // heads
    chunk = chunk_of(i_slot, cu_seqlens, tokens, sequences, per_sequence, halvings, BLOCK_T)
    if chunk.count <= 0:
        return
    o_t = tl.arange(0, BLOCK_T)
    o_row = chunk.first + o_t
    douts = slice_of(dout, chunk.batch, i_h, chunk.start, chunk.length)
    outs = slice_of(out, chunk.batch, i_h, chunk.start, chunk.length)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    for c in range(0, VALUE_DIM, BLOCK_V):
        o_c = c + tl.arange(0, BLOCK_V)
        b_dout = load_tile(douts, o_row, o_c, VALUE_DIM).to(tl.float32)
        b_sum += tl.sum(b_dout * load_tile(outs, o_row, o_c, VALUE_DIM).to(tl.float32), 1)
    b_z = load_statistic(normalizer, cu_seqlens, chunk, i_h, heads, tokens, o_t, 1.0)
    o_z = statistics_of(cu_seqlens, chunk.batch, i_h, heads, tokens, chunk.start)
    tl.store(delta + o_z + o_row, -b_sum / b_z, mask=o_t < chunk.count)


# delta = -rowsum(dO O) / z
@triton.jit
def gradient_of_sums(normalizer, delta, cu_seqlens, chunk, i_h, heads, tokens, o_t):
    """1 / z, with dy = dout / z, and delta of the normalizer column."""
    b_factor = tl.full(o_t.shape, 1.0, tl.float32)
    b_delta = tl.zeros(o_t.shape, tl.float32)
    if normalizer is not None:
        b_factor /= load_statistic(normalizer, cu_seqlens, chunk, i_h, heads, tokens, o_t, 1.0)
        b_delta += load_statistic(delta, cu_seqlens, chunk, i_h, heads, tokens, o_t, 0.0)
    return b_factor, b_delta


@triton.jit
def rows_times_state(
    rows,
    o_row,
    p_state,
    o_f,
    PRECISION: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Y S^T for rows o_f of a state, [BLOCK_T, BLOCK_F]."""
    b_x = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for c in range(0, VALUE_DIM, BLOCK_V):
        o_c = c + tl.arange(0, BLOCK_V)
        b_state = load_state(p_state, o_f, o_c, FEATURES, VALUE_DIM, COLUMNS)
        b_x += product(load_tile(rows, o_row, o_c, VALUE_DIM), tl.trans(b_state), PRECISION)
    return b_x


@triton.jit(do_not_specialize=LENGTHS)
def queries_kernel(
    q,
    k,
    v,
    dout,
    normalizer,
    delta,
    states,
    dq,
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
        return
    o_t = tl.arange(0, BLOCK_T)
    o_row = chunk.first + o_t
    remains = remains_of(decay, decay_batch, chunk, i_h, o_t)
    queries = slice_of(q, chunk.batch, i_h, chunk.start, chunk.length)
    keys = slice_of(k, chunk.batch, i_h // group, chunk.start, chunk.length)
    values = slice_of(v, chunk.batch, i_h // group, chunk.start, chunk.length)
    douts = slice_of(dout, chunk.batch, i_h, chunk.start, chunk.length)
    p_state = states + (tl.cast(i_slot, tl.int64) * heads + i_h) * (FEATURES * COLUMNS)
    b_factor, b_delta = gradient_of_sums(
        normalizer, delta, cu_seqlens, chunk, i_h, heads, tokens, o_t
    )
    o_d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)

    # dW = dO V^T, times decay
    b_dw = products_of_rows(
        douts, values, o_row, "identity", PRECISION, VALUE_DIM, BLOCK_T, BLOCK_V
    )
    b_dw = b_dw * b_factor[:, None] + b_delta[:, None]
    b_dw *= between(remains, o_t, False, False)
    if MAP == "taylor2":
        b_u = products_of_rows(queries, keys, o_row, MAP, PRECISION, HEAD_DIM, BLOCK_T, BLOCK_D)
        b_dw *= 1.0 + b_u * scale
    # dphi(q) = dW phi(K) + decay dO S^T
    b_dq = product(b_dw, load_mapped(keys, o_row, o_d, MAP, HEAD_DIM), PRECISION) * scale

    b_start = from_start(remains, o_t)
    for tile in range(0, FEATURES if MAP == "taylor2" else BLOCK_F, BLOCK_F):
        o_f = tile + tl.arange(0, BLOCK_F)
        if MAP != "taylor2":
            o_f = o_d
        b_df = rows_times_state(
            douts,
            o_row,
            p_state,
            o_f,
            PRECISION,
            VALUE_DIM,
            FEATURES,
            COLUMNS,
            BLOCK_T,
            BLOCK_F,
            BLOCK_V,
        )
        b_df *= b_factor[:, None]
        if normalizer is not None:
            b_column = load_normalizer(p_state, o_f, FEATURES, COLUMNS)
            b_df += b_delta[:, None] * b_column[None, :]
        b_df *= b_start[:, None]
        if MAP == "taylor2":
            b_dq += fold_moments(
                b_df, queries, o_row, o_f, scale, PRECISION, True, HEAD_DIM, FEATURES, BLOCK_D
            )
        else:
            b_dq += b_df * scale
    if MAP != "taylor2":
        b_dq *= derivative(load_tile(queries, o_row, o_d, HEAD_DIM), MAP)
    store_tile(
        slice_of(dq, chunk.batch, i_h, chunk.start, chunk.length), o_row, o_d, b_dq, HEAD_DIM
    )


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    q,
    k,
    v,
    dout,
    normalizer,
    delta,
    gradients,
    dk,
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
    """dK; one program sums over the query heads of its GQA group, in order."""
    kv_heads = heads // group
    i = tl.program_id(0)
    i_tile = i % tiles
    i_hk = i // tiles % kv_heads
    i_slot = i // (tiles * kv_heads)
    chunk = chunk_of(i_slot, cu_seqlens, tokens, sequences, per_sequence, halvings, BLOCK_T)
    if chunk.count <= 0:
        return
    o_t = tl.arange(0, BLOCK_T)
    o_row = chunk.first + o_t
    keys = slice_of(k, chunk.batch, i_hk, chunk.start, chunk.length)
    values = slice_of(v, chunk.batch, i_hk, chunk.start, chunk.length)
    o_d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    b_dk = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i_h in range(i_hk * group, (i_hk + 1) * group):
        remains = remains_of(decay, decay_batch, chunk, i_h, o_t)
        queries = slice_of(q, chunk.batch, i_h, chunk.start, chunk.length)
        douts = slice_of(dout, chunk.batch, i_h, chunk.start, chunk.length)
        p_state = gradients + (tl.cast(i_slot, tl.int64) * heads + i_h) * (FEATURES * COLUMNS)
        b_factor, b_delta = gradient_of_sums(
            normalizer, delta, cu_seqlens, chunk, i_h, heads, tokens, o_t
        )
        # dW^T = V dO^T, times decay
        b_dw = products_of_rows(
            values, douts, o_row, "identity", PRECISION, VALUE_DIM, BLOCK_T, BLOCK_V
        )
        b_dw = b_dw * b_factor[None, :] + b_delta[None, :]
        b_dw *= between(remains, o_t, True, False)
        if MAP == "taylor2":
            b_u = products_of_rows(keys, queries, o_row, MAP, PRECISION, HEAD_DIM, BLOCK_T, BLOCK_D)
            b_dw *= 1.0 + b_u * scale
        # dphi(k) += dW^T phi(Q) + decay V G^T
        b_dk += product(b_dw, load_mapped(queries, o_row, o_d, MAP, HEAD_DIM), PRECISION) * scale

        b_end = to_end(remains, chunk, o_t)
        for tile in range(0, FEATURES if MAP == "taylor2" else BLOCK_F, BLOCK_F):
            o_f = tile + tl.arange(0, BLOCK_F)
            if MAP != "taylor2":
                o_f = o_d
            b_df = rows_times_state(
                values,
                o_row,
                p_state,
                o_f,
                PRECISION,
                VALUE_DIM,
                FEATURES,
                COLUMNS,
                BLOCK_T,
                BLOCK_F,
                BLOCK_V,
            )
            if normalizer is not None:
                b_df += load_normalizer(p_state, o_f, FEATURES, COLUMNS)[None, :]
            b_df *= b_end[:, None]
            if MAP == "taylor2":
                b_dk += fold_moments(
                    b_df, keys, o_row, o_f, scale, PRECISION, False, HEAD_DIM, FEATURES, BLOCK_D
                )
            else:
                b_dk += b_df
    if MAP != "taylor2":
        b_dk *= derivative(load_tile(keys, o_row, o_d, HEAD_DIM), MAP)
    rows = slice_of(dk, chunk.batch, i_hk, chunk.start, chunk.length)
    store_tile(rows, o_row, o_d, b_dk, HEAD_DIM)


@triton.jit(do_not_specialize=LENGTHS)
def values_kernel(
    q,
    k,
    v,
    dout,
    normalizer,
    delta,
    gradients,
    dv,
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
    kv_heads = heads // group
    i = tl.program_id(0)
    i_tile = i % tiles
    i_hk = i // tiles % kv_heads
    i_slot = i // (tiles * kv_heads)
    chunk = chunk_of(i_slot, cu_seqlens, tokens, sequences, per_sequence, halvings, BLOCK_T)
    if chunk.count <= 0:
        return
    o_t = tl.arange(0, BLOCK_T)
    o_row = chunk.first + o_t
    keys = slice_of(k, chunk.batch, i_hk, chunk.start, chunk.length)
    o_c = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    b_dv = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for i_h in range(i_hk * group, (i_hk + 1) * group):
        remains = remains_of(decay, decay_batch, chunk, i_h, o_t)
        queries = slice_of(q, chunk.batch, i_h, chunk.start, chunk.length)
        douts = slice_of(dout, chunk.batch, i_h, chunk.start, chunk.length)
        p_state = gradients + (tl.cast(i_slot, tl.int64) * heads + i_h) * (FEATURES * COLUMNS)
        # dV += phi(K) G decay + W^T dy
        b_sum = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for f in range(0, FEATURES, BLOCK_F):
            o_f = f + tl.arange(0, BLOCK_F)
            b_k = load_features(keys, o_row, o_f, scale, False, MAP, HEAD_DIM, FEATURES)
            b_state = load_state(p_state, o_f, o_c, FEATURES, VALUE_DIM, COLUMNS)
            b_sum += product(b_k, b_state, PRECISION)
        b_dv += b_sum * to_end(remains, chunk, o_t)[:, None]
        b_factor, _ = gradient_of_sums(
            normalizer, delta, cu_seqlens, chunk, i_h, heads, tokens, o_t
        )
        b_w = products_of_rows(keys, queries, o_row, MAP, PRECISION, HEAD_DIM, BLOCK_T, BLOCK_D)
        b_w = weights(b_w, scale, MAP) * between(remains, o_t, True, False) * b_factor[None, :]
        b_dv += product(b_w, load_tile(douts, o_row, o_c, VALUE_DIM), PRECISION)
    rows = slice_of(dv, chunk.batch, i_hk, chunk.start, chunk.length)
    store_tile(rows, o_row, o_c, b_dv, VALUE_DIM)
