"""Gradient of the log decay of token t: the sum over all terms that the decay of t multiplies.

They are: pairs of tokens with j < t <= i, the incoming state read by tokens i >= t, tokens j < t
written to the outgoing state, and incoming to outgoing state. Only the pairs are computed as a
difference: their sums over i >= t and over j >= t share the pairs with both i and j >= t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import span
from .common import (
    LENGTHS,
    between,
    factor_of_chunk,
    first_slot,
    from_start,
    load_features,
    load_normalizer,
    load_state,
    products_of_features,
    products_of_values,
    program_of,
    remains_of,
    rows_of,
    scale_beside,
    state_of,
    to_end,
    weights,
)
from .linear_attention_backward import gradient_of_sums, rows_times_state


@triton.jit(do_not_specialize=LENGTHS)
def decay_kernel(
    inputs, states, gradients, ddecay, sums, decay_batch, tokens, sequences, per_sequence, halvings,
    heads, group, form,
):  # fmt: skip
    """Writes ddecay per token, or for constant decay per head one partial sum per chunk."""
    i = tl.program_id(0)
    chunk, i_h, _ = program_of(
        i, inputs, tokens, sequences, per_sequence, halvings, heads, heads, 1, form
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
    p_before = state_of(states, chunk, i_h, form)
    p_after = state_of(gradients, chunk, i_h, form)
    b_factor, b_delta = gradient_of_sums(inputs, chunk, i_h, o_t)

    b_to = tl.zeros([form.BLOCK_T], tl.float32)  # incoming state read by each token
    b_from = tl.zeros([form.BLOCK_T], tl.float32)  # each token written to the outgoing state
    b_through = tl.zeros([form.BLOCK_F], tl.float32)
    # dO S^T . phi(q) and V G^T . phi(k), with S the incoming state and G the gradient of the
    # outgoing
    for f in range(0, form.FEATURES, form.BLOCK_F):
        o_f = f + tl.arange(0, form.BLOCK_F)
        b_q = load_features(queries, o_row, o_f, inputs.scale, True, form)
        b_k = load_features(keys, o_row, o_f, inputs.scale, False, form)
        b_df = rows_times_state(douts, o_row, p_before, o_f, form)
        b_to += tl.sum(b_df * b_q.to(tl.float32), 1) * b_factor
        b_df = rows_times_state(values, o_row, p_after, o_f, form)
        b_from += tl.sum(b_df * b_k.to(tl.float32), 1)
        for c in range(0, form.VALUE_DIM, form.BLOCK_V):
            o_c = c + tl.arange(0, form.BLOCK_V)
            b_before = load_state(p_before, o_f, o_c, form)
            b_through += tl.sum(b_before * load_state(p_after, o_f, o_c, form), 1)
        if inputs.normalizer is not None:
            b_before = load_normalizer(p_before, o_f, form)
            b_after = load_normalizer(p_after, o_f, form)
            b_to += tl.sum(b_q.to(tl.float32) * b_before[None, :], 1) * b_delta
            b_from += tl.sum(b_k.to(tl.float32) * b_after[None, :], 1)
            b_through += b_before * b_after
    b_to *= from_start(remains, o_t) * scale_beside(inputs.scale, form.MAP)
    b_from *= to_end(remains, chunk, o_t)
    through = tl.sum(b_through, 0) * factor_of_chunk(remains)

    # dW W, with dW = dO V^T
    b_pairs = products_of_values(douts, values, o_row, form)
    b_pairs = b_pairs * b_factor[:, None] + b_delta[:, None]
    b_w = products_of_features(queries, keys, o_row, form)
    b_pairs *= weights(b_w, inputs.scale, form.MAP) * between(remains, o_t, False, True)

    b_to += tl.sum(b_pairs, 1)
    b_within = tl.sum(b_pairs, 0)
    m_seen = o_t[:, None] >= o_t[None, :]  # [i, t]
    b_decay = tl.sum(tl.where(m_seen, (b_to - b_within)[:, None], b_from[:, None]), 0) + through
    b_decay = tl.where(o_t < chunk.count, b_decay, 0.0)
    if inputs.decay.seq is None:
        tl.store(sums + chunk.slot * heads + i_h, tl.sum(b_decay, 0))
    else:
        o_token = tl.cast(chunk.start, tl.int64) + o_row
        if inputs.cu_seqlens is None:
            o_token += chunk.batch * tokens
        tl.store(ddecay + o_token * heads + i_h, b_decay, mask=o_t < chunk.count)


@triton.jit(do_not_specialize=LENGTHS)
def sum_chunks_kernel(
    sums, ddecay, cu_seqlens, tokens, per_sequence, heads,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
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
