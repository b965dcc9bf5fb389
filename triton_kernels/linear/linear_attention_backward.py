"""Gradients of one chunk, from its own pairs of tokens and from the states on both sides.

With y the sums before division by the normalizer z: dy = dout / z, and the normalizer column has
delta = -(dout . out) / z. dW is the gradient of pair weights, including decay; G is the gradient of
the outgoing state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    LENGTHS,
    between,
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
    products_of_features,
    products_of_values,
    program_of,
    remains_of,
    rows_of,
    state_of,
    statistic_pointers,
    store_tile,
    to_end,
    weights,
)


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(
    inputs, out, delta, tokens, sequences, per_sequence, halvings, heads, form
):  # fmt: skip
    """delta = -rowsum(dO O) / z"""
    i = tl.program_id(0)
    chunk, i_h, _ = program_of(
        i, inputs, tokens, sequences, per_sequence, halvings, heads, heads, 1, form
    )
    if chunk.count <= 0:
        return
    o_t = tl.arange(0, form.BLOCK_T)
    o_row = chunk.first + o_t
    douts = rows_of(inputs.dout, chunk, i_h)
    outs = rows_of(out, chunk, i_h)
    b_sum = tl.zeros([form.BLOCK_T], tl.float32)
    for c in range(0, form.VALUE_DIM, form.BLOCK_V):
        o_c = c + tl.arange(0, form.BLOCK_V)
        b_dout = load_tile(douts, o_row, o_c, form.VALUE_DIM).to(tl.float32)
        b_sum += tl.sum(b_dout * load_tile(outs, o_row, o_c, form.VALUE_DIM).to(tl.float32), 1)
    b_z = load_statistic(inputs.normalizer, chunk, i_h, o_t, 1.0)
    p_delta = statistic_pointers(delta, chunk, i_h, o_t)
    tl.store(p_delta, -b_sum / b_z, mask=o_t < chunk.count)


@triton.jit
def gradient_of_sums(inputs, chunk, i_h, o_t):
    """1 / z, with dy = dout / z, and delta of the normalizer column."""
    b_factor = tl.full(o_t.shape, 1.0, tl.float32)
    b_delta = tl.zeros(o_t.shape, tl.float32)
    if inputs.normalizer is not None:
        b_factor /= load_statistic(inputs.normalizer, chunk, i_h, o_t, 1.0)
        b_delta += load_statistic(inputs.delta, chunk, i_h, o_t, 0.0)
    return b_factor, b_delta


@triton.jit
def rows_times_state(rows, o_row, p_state, o_f, form):
    """Y S^T for rows o_f of a state, [BLOCK_T, BLOCK_F]."""
    b_x = tl.zeros([form.BLOCK_T, form.BLOCK_F], tl.float32)
    for c in range(0, form.VALUE_DIM, form.BLOCK_V):
        o_c = c + tl.arange(0, form.BLOCK_V)
        b_state = tl.trans(load_state(p_state, o_f, o_c, form))
        b_x += product(load_tile(rows, o_row, o_c, form.VALUE_DIM), b_state, form.PRECISION)
    return b_x


@triton.jit(do_not_specialize=LENGTHS)
def queries_kernel(
    inputs, states, dq, decay_batch, tokens, sequences, per_sequence, halvings, heads, group, tiles,
    form,
):  # fmt: skip
    i = tl.program_id(0)
    chunk, i_h, i_tile = program_of(
        i, inputs, tokens, sequences, per_sequence, halvings, heads, heads, tiles, form
    )
    if chunk.count <= 0:
        return
    o_t = tl.arange(0, form.BLOCK_T)
    o_row = chunk.first + o_t
    remains = remains_of(inputs.decay, decay_batch, chunk, i_h, o_t)
    queries = rows_of(inputs.q, chunk, i_h)
    keys = rows_of(inputs.k, chunk, i_h // group)
    values = rows_of(inputs.v, chunk, i_h // group)
    douts = rows_of(inputs.dout, chunk, i_h)
    p_state = state_of(states, chunk, i_h, form)
    b_factor, b_delta = gradient_of_sums(inputs, chunk, i_h, o_t)
    o_d = i_tile * form.BLOCK_D + tl.arange(0, form.BLOCK_D)

    # dW = dO V^T, times decay
    b_dw = products_of_values(douts, values, o_row, form)
    b_dw = b_dw * b_factor[:, None] + b_delta[:, None]
    b_dw *= between(remains, o_t, False, False)
    if form.MAP == "taylor2":
        b_dw *= 1.0 + products_of_features(queries, keys, o_row, form) * inputs.scale
    # dphi(q) = dW phi(K) + decay dO S^T
    b_k = load_mapped(keys, o_row, o_d, form.MAP, form.HEAD_DIM)
    b_dq = product(b_dw, b_k, form.PRECISION) * inputs.scale

    b_start = from_start(remains, o_t)
    for f in range(0, form.FEATURES if form.MAP == "taylor2" else form.BLOCK_F, form.BLOCK_F):
        o_f = f + tl.arange(0, form.BLOCK_F)
        if form.MAP != "taylor2":
            o_f = o_d
        b_df = rows_times_state(douts, o_row, p_state, o_f, form) * b_factor[:, None]
        if inputs.normalizer is not None:
            b_df += b_delta[:, None] * load_normalizer(p_state, o_f, form)[None, :]
        b_df *= b_start[:, None]
        if form.MAP == "taylor2":
            b_dq += fold_moments(b_df, queries, o_row, o_f, inputs.scale, True, form)
        else:
            b_dq += b_df * inputs.scale
    if form.MAP != "taylor2":
        b_dq *= derivative(load_tile(queries, o_row, o_d, form.HEAD_DIM), form.MAP)
    store_tile(rows_of(dq, chunk, i_h), o_row, o_d, b_dq, form.HEAD_DIM)


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    inputs, gradients, dk, decay_batch, tokens, sequences, per_sequence, halvings, heads, group,
    tiles, form,
):  # fmt: skip
    """dK; one program sums over the query heads of its GQA group, in order."""
    i = tl.program_id(0)
    chunk, i_hk, i_tile = program_of(
        i, inputs, tokens, sequences, per_sequence, halvings, heads, heads // group, tiles, form
    )
    if chunk.count <= 0:
        return
    o_t = tl.arange(0, form.BLOCK_T)
    o_row = chunk.first + o_t
    keys = rows_of(inputs.k, chunk, i_hk)
    values = rows_of(inputs.v, chunk, i_hk)
    o_d = i_tile * form.BLOCK_D + tl.arange(0, form.BLOCK_D)
    b_dk = tl.zeros([form.BLOCK_T, form.BLOCK_D], tl.float32)
    for i_h in range(i_hk * group, (i_hk + 1) * group):
        remains = remains_of(inputs.decay, decay_batch, chunk, i_h, o_t)
        queries = rows_of(inputs.q, chunk, i_h)
        douts = rows_of(inputs.dout, chunk, i_h)
        p_state = state_of(gradients, chunk, i_h, form)
        b_factor, b_delta = gradient_of_sums(inputs, chunk, i_h, o_t)
        # dW^T = V dO^T, times decay
        b_dw = products_of_values(values, douts, o_row, form)
        b_dw = b_dw * b_factor[None, :] + b_delta[None, :]
        b_dw *= between(remains, o_t, True, False)
        if form.MAP == "taylor2":
            b_dw *= 1.0 + products_of_features(keys, queries, o_row, form) * inputs.scale
        # dphi(k) += dW^T phi(Q) + decay V G^T
        b_q = load_mapped(queries, o_row, o_d, form.MAP, form.HEAD_DIM)
        b_dk += product(b_dw, b_q, form.PRECISION) * inputs.scale

        b_end = to_end(remains, chunk, o_t)
        for f in range(0, form.FEATURES if form.MAP == "taylor2" else form.BLOCK_F, form.BLOCK_F):
            o_f = f + tl.arange(0, form.BLOCK_F)
            if form.MAP != "taylor2":
                o_f = o_d
            b_df = rows_times_state(values, o_row, p_state, o_f, form)
            if inputs.normalizer is not None:
                b_df += load_normalizer(p_state, o_f, form)[None, :]
            b_df *= b_end[:, None]
            if form.MAP == "taylor2":
                b_dk += fold_moments(b_df, keys, o_row, o_f, inputs.scale, False, form)
            else:
                b_dk += b_df
    if form.MAP != "taylor2":
        b_dk *= derivative(load_tile(keys, o_row, o_d, form.HEAD_DIM), form.MAP)
    store_tile(rows_of(dk, chunk, i_hk), o_row, o_d, b_dk, form.HEAD_DIM)


@triton.jit(do_not_specialize=LENGTHS)
def values_kernel(
    inputs, gradients, dv, decay_batch, tokens, sequences, per_sequence, halvings, heads, group,
    tiles, form,
):  # fmt: skip
    i = tl.program_id(0)
    chunk, i_hk, i_tile = program_of(
        i, inputs, tokens, sequences, per_sequence, halvings, heads, heads // group, tiles, form
    )
    if chunk.count <= 0:
        return
    o_t = tl.arange(0, form.BLOCK_T)
    o_row = chunk.first + o_t
    keys = rows_of(inputs.k, chunk, i_hk)
    o_c = i_tile * form.BLOCK_V + tl.arange(0, form.BLOCK_V)
    b_dv = tl.zeros([form.BLOCK_T, form.BLOCK_V], tl.float32)
    for i_h in range(i_hk * group, (i_hk + 1) * group):
        remains = remains_of(inputs.decay, decay_batch, chunk, i_h, o_t)
        queries = rows_of(inputs.q, chunk, i_h)
        douts = rows_of(inputs.dout, chunk, i_h)
        p_state = state_of(gradients, chunk, i_h, form)
        # dV += phi(K) G decay + W^T dy
        b_sum = tl.zeros([form.BLOCK_T, form.BLOCK_V], tl.float32)
        for f in range(0, form.FEATURES, form.BLOCK_F):
            o_f = f + tl.arange(0, form.BLOCK_F)
            b_k = load_features(keys, o_row, o_f, inputs.scale, False, form)
            b_sum += product(b_k, load_state(p_state, o_f, o_c, form), form.PRECISION)
        b_dv += b_sum * to_end(remains, chunk, o_t)[:, None]
        b_factor, _ = gradient_of_sums(inputs, chunk, i_h, o_t)
        b_w = products_of_features(keys, queries, o_row, form)
        b_w = weights(b_w, inputs.scale, form.MAP) * between(remains, o_t, True, False)
        b_w *= b_factor[None, :]
        b_dv += product(b_w, load_tile(douts, o_row, o_c, form.VALUE_DIM), form.PRECISION)
    store_tile(rows_of(dv, chunk, i_hk), o_row, o_c, b_dv, form.VALUE_DIM)
