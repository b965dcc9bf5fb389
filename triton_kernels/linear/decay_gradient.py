"""Gradient of the log decay of token t: the sum over all terms that the decay of t multiplies.

They are: pairs of tokens with j < t <= i, the incoming state read by tokens i >= t, tokens j < t
written to the outgoing state, and incoming to outgoing state. Only the pairs are computed as a
difference: their sums over i >= t and over j >= t share the pairs with both i and j >= t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import slice_of, span
from .common import (
    LENGTHS,
    between,
    chunk_of,
    factor_of_chunk,
    first_slot,
    from_start,
    load_features,
    load_normalizer,
    load_state,
    products_of_rows,
    remains_of,
    scale_beside,
    to_end,
    weights,
)
from .linear_attention_backward import gradient_of_sums, rows_times_state


@triton.jit(do_not_specialize=LENGTHS)
def decay_kernel(
    q,
    k,
    v,
    dout,
    normalizer,
    delta,
    states,
    gradients,
    ddecay,
    sums,
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
    """Writes ddecay per token, or for constant decay per head one partial sum per chunk."""
    i_h = tl.program_id(0) % heads
    i_slot = tl.program_id(0) // heads
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
    o_state = (tl.cast(i_slot, tl.int64) * heads + i_h) * (FEATURES * COLUMNS)
    p_before = states + o_state
    p_after = gradients + o_state
    b_factor, b_delta = gradient_of_sums(
        normalizer, delta, cu_seqlens, chunk, i_h, heads, tokens, o_t
    )

    b_to = tl.zeros([BLOCK_T], tl.float32)  # incoming state read by each token
    b_from = tl.zeros([BLOCK_T], tl.float32)  # each token written to the outgoing state
    b_through = tl.zeros([BLOCK_F], tl.float32)
    # dO S^T . phi(q) and V G^T . phi(k), with S the incoming state and G the gradient of the
    # outgoing
    for f in range(0, FEATURES, BLOCK_F):
        o_f = f + tl.arange(0, BLOCK_F)
        b_q = load_features(queries, o_row, o_f, scale, True, MAP, HEAD_DIM, FEATURES)
        b_k = load_features(keys, o_row, o_f, scale, False, MAP, HEAD_DIM, FEATURES)
        b_df = rows_times_state(
            douts,
            o_row,
            p_before,
            o_f,
            PRECISION,
            VALUE_DIM,
            FEATURES,
            COLUMNS,
            BLOCK_T,
            BLOCK_F,
            BLOCK_V,
        )
        b_to += tl.sum(b_df * b_q.to(tl.float32), 1) * b_factor
        b_df = rows_times_state(
            values,
            o_row,
            p_after,
            o_f,
            PRECISION,
            VALUE_DIM,
            FEATURES,
            COLUMNS,
            BLOCK_T,
            BLOCK_F,
            BLOCK_V,
        )
        b_from += tl.sum(b_df * b_k.to(tl.float32), 1)
        for c in range(0, VALUE_DIM, BLOCK_V):
            o_c = c + tl.arange(0, BLOCK_V)
            b_before = load_state(p_before, o_f, o_c, FEATURES, VALUE_DIM, COLUMNS)
            b_after = load_state(p_after, o_f, o_c, FEATURES, VALUE_DIM, COLUMNS)
            b_through += tl.sum(b_before * b_after, 1)
        if normalizer is not None:
            b_before = load_normalizer(p_before, o_f, FEATURES, COLUMNS)
            b_after = load_normalizer(p_after, o_f, FEATURES, COLUMNS)
            b_to += tl.sum(b_q.to(tl.float32) * b_before[None, :], 1) * b_delta
            b_from += tl.sum(b_k.to(tl.float32) * b_after[None, :], 1)
            b_through += b_before * b_after
    b_to *= from_start(remains, o_t) * scale_beside(scale, MAP)
    b_from *= to_end(remains, chunk, o_t)
    through = tl.sum(b_through, 0) * factor_of_chunk(remains)

    # dW W, with dW = dO V^T
    b_pairs = products_of_rows(
        douts, values, o_row, "identity", PRECISION, VALUE_DIM, BLOCK_T, BLOCK_V
    )
    b_pairs = b_pairs * b_factor[:, None] + b_delta[:, None]
    b_w = products_of_rows(queries, keys, o_row, MAP, PRECISION, HEAD_DIM, BLOCK_T, BLOCK_D)
    b_pairs *= weights(b_w, scale, MAP) * between(remains, o_t, False, True)

    b_to += tl.sum(b_pairs, 1)
    b_within = tl.sum(b_pairs, 0)
    m_seen = o_t[:, None] >= o_t[None, :]  # [i, t]
    b_decay = tl.sum(tl.where(m_seen, (b_to - b_within)[:, None], b_from[:, None]), 0) + through
    b_decay = tl.where(o_t < chunk.count, b_decay, 0.0)
    if decay.seq is None:
        tl.store(sums + i_slot * heads + i_h, tl.sum(b_decay, 0))
    else:
        o_token = tl.cast(chunk.start, tl.int64) + o_row
        if cu_seqlens is None:
            o_token += chunk.batch * tokens
        tl.store(ddecay + o_token * heads + i_h, b_decay, mask=o_t < chunk.count)


@triton.jit(do_not_specialize=LENGTHS)
def sum_chunks_kernel(
    sums,
    ddecay,
    cu_seqlens,
    tokens,
    per_sequence,
    heads,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sums chunk partials to [sequences, heads]."""
    i_b = tl.program_id(0)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < heads
    _, length = span(cu_seqlens, tokens, tokens, i_b)
    slot = first_slot(cu_seqlens, tokens, i_b, per_sequence, BLOCK_T)
    b_sum = tl.zeros([BLOCK_H], tl.float32)
    for c in range(tl.cdiv(length, BLOCK_T)):
        b_sum += tl.load(sums + (slot + c) * heads + o_h, mask=m_h, other=0.0)
    tl.store(ddecay + i_b * heads + o_h, b_sum, mask=m_h)
