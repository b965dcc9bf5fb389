"""Kernels of titans_memory. The first two iterate over the blocks of a sequence, one forward and
one in reverse, for a slice of the value columns of a head, independent of other columns. The third
handles one block of one head, independent of other blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import slice_of, span
from .common import load_tile, product, store_tile
from .titans_blocks import (
    LENGTHS,
    at_token,
    block_of,
    blocks_of,
    end_of,
    first_gate,
    kept_states,
    row_at,
    sequence_of_slot,
    slot_of,
    state_tile,
    store_gate,
    weigh,
)


@triton.jit
def share_of(heads, slices, BLOCK_V: tl.constexpr):
    """Sequence, head and value columns of this program."""
    i = tl.program_id(0)
    i_b = (i // (slices * heads)).to(tl.int64)
    return i_b, i // slices % heads, i % slices * BLOCK_V + tl.arange(0, BLOCK_V)


@triton.jit
def state_at(states, i_b, i_h):
    return states.data + i_b * states.sequence + tl.cast(i_h, tl.int64) * states.head


@triton.jit
def begin_state(
    p_state, p_start, given, i_b, i_h, o_c, head_dim, FROM_STATE: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Initializes the state of a program from the given state or zeros, and the state at the start
    of the chunk from it (FROM_STATE) or from zeros."""
    for d in range(0, head_dim, BLOCK_D):
        o_tile, m_tile = state_tile(d + tl.arange(0, BLOCK_D), o_c, HEAD_DIM, VALUE_DIM)
        b_state = tl.zeros([BLOCK_D, o_c.shape[0]], tl.float32)
        if given is not None:
            b_state = tl.load(state_at(given, i_b, i_h) + o_tile, mask=m_tile, other=0.0)
        tl.store(p_state + o_tile, b_state, mask=m_tile)
        if p_start is not None:
            b_start = tl.zeros([BLOCK_D, o_c.shape[0]], tl.float32)
            if FROM_STATE:
                b_start = b_state
            tl.store(p_start + o_tile, b_start, mask=m_tile)


@triton.jit
def end_state(
    p_state, wanted, i_b, i_h, o_c, head_dim,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if wanted is not None:
        for d in range(0, head_dim, BLOCK_D):
            o_tile, m_tile = state_tile(d + tl.arange(0, BLOCK_D), o_c, HEAD_DIM, VALUE_DIM)
            b_state = tl.load(p_state + o_tile, mask=m_tile, other=0.0)
            tl.store(state_at(wanted, i_b, i_h) + o_tile, b_state, mask=m_tile)


@triton.jit
def nan_from(m_finite, o_t):
    """Per column: NaN from the first non-finite token on, 0 before it."""
    o_first = tl.min(tl.where(m_finite, m_finite.shape[0], o_t[:, None]), 0)
    return tl.where(o_t[:, None] >= o_first[None, :], float("nan"), 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def states_kernel(
    q, k, v, out, gates, initial_memory, initial_momentum, memory, momentum, scratch, states, us,
    cu_seqlens, tokens, sequences, chunk_size, parts, halvings, heads, slices, head_dim, value_dim,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes out and the final states; KEEP: stores the states entering each block and U instead,
    for the backward. scratch holds M, S and G."""
    i_b, i_h, o_c = share_of(heads, slices, BLOCK_V)
    start, length = span(cu_seqlens, tokens, tokens, i_b)
    o_gate = first_gate(cu_seqlens, i_b, i_h, start, tokens, heads)
    slot = slot_of(cu_seqlens, tokens, i_b, chunk_size, parts, BLOCK_T)
    o_t = tl.arange(0, BLOCK_T)
    SIZE: tl.constexpr = HEAD_DIM * VALUE_DIM
    p_memory = scratch + (i_b * heads + i_h) * (3 * SIZE)
    p_momentum = p_memory + SIZE
    p_start = p_memory + 2 * SIZE
    begin_state(
        p_memory, p_start, initial_memory, i_b, i_h, o_c, head_dim, True, HEAD_DIM, VALUE_DIM,
        BLOCK_D,
    )  # fmt: skip
    begin_state(
        p_momentum, None, initial_momentum, i_b, i_h, o_c, head_dim, False, HEAD_DIM, VALUE_DIM,
        BLOCK_D,
    )  # fmt: skip
    for i in range(blocks_of(length, chunk_size, parts, BLOCK_T)):
        tl.debug_barrier()  # makes stores of other threads visible
        block = block_of(i, length, chunk_size, parts, BLOCK_T)
        end = block.first + block.count  # rows past the end are 0
        o_row = block.first + o_t
        queries = slice_of(q, i_b, i_h, start, end)
        keys = slice_of(k, i_b, i_h, start, end)
        b_u = -load_tile(slice_of(v, i_b, i_h, start, end), o_row, o_c, VALUE_DIM).to(tl.float32)
        b_memory_q = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        b_momentum_q = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        b_pairs = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for d in range(0, head_dim, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_k = load_tile(keys, o_row, o_d, HEAD_DIM)
            # U = K G - V
            b_u += product(b_k, tl.load(p_start + o_tile, mask=m_tile, other=0.0), PRECISION)
            b_memory = tl.load(p_memory + o_tile, mask=m_tile, other=0.0)
            b_momentum = tl.load(p_momentum + o_tile, mask=m_tile, other=0.0)
            if KEEP:
                p_kept = kept_states(states, slot + i, i_h, heads, SIZE)
                tl.store(p_kept + o_tile, b_memory, mask=m_tile)
                tl.store(p_kept + SIZE + o_tile, b_momentum, mask=m_tile)
            else:
                b_q = load_tile(queries, o_row, o_d, HEAD_DIM)
                # Q M, Q S and Q K^T
                b_memory_q += product(b_q, b_memory, PRECISION)
                b_momentum_q += product(b_q, b_momentum, PRECISION)
                b_pairs += product(b_q, tl.trans(b_k), PRECISION)
        b_w, _, f = weigh(gates, o_gate, heads, block, o_t, False, BLOCK_T)
        if KEEP:
            store_tile(slice_of(us, i_b, i_h, start, end), o_row, o_c, b_u, VALUE_DIM)
        else:
            # out = memory_t Q M + momentum_t Q S - (W * Q K^T) U, causal
            b_out = f.memory[:, None] * b_memory_q + f.momentum[:, None] * b_momentum_q
            # 0 for a later token, even if its key is not finite
            b_pairs = tl.where(o_t[:, None] >= o_t[None, :], -b_w * b_pairs, 0.0)
            m_finite = b_u - b_u == 0.0
            b_out += product(b_pairs, tl.where(m_finite, b_u, 0.0), PRECISION)
            b_out += nan_from(m_finite, o_t)
            store_tile(slice_of(out, i_b, i_h, start, end), o_row, o_c, b_out, VALUE_DIM)
        tl.debug_barrier()
        to_memory, to_momentum, stays = end_of(f, block, o_t)
        next_starts = block_of(i + 1, length, chunk_size, parts, BLOCK_T).starts
        for d in range(0, head_dim, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_k = tl.trans(load_tile(keys, o_row, o_d, HEAD_DIM).to(tl.float32))
            b_memory = tl.load(p_memory + o_tile, mask=m_tile, other=0.0)
            b_momentum = tl.load(p_momentum + o_tile, mask=m_tile, other=0.0)
            # M = memory M + momentum S - (w_end K)^T U, S = kept S - (e_end K)^T U
            b_memory = to_memory * b_memory + to_momentum * b_momentum
            b_memory -= product(b_k * f.w_end[None, :], b_u, PRECISION)
            b_momentum = stays * b_momentum - product(b_k * f.e_end[None, :], b_u, PRECISION)
            tl.store(p_memory + o_tile, b_memory, mask=m_tile)
            tl.store(p_momentum + o_tile, b_momentum, mask=m_tile)
            if next_starts:
                tl.store(p_start + o_tile, b_memory, mask=m_tile)
    tl.debug_barrier()
    end_state(p_memory, memory, i_b, i_h, o_c, head_dim, HEAD_DIM, VALUE_DIM, BLOCK_D)
    end_state(p_momentum, momentum, i_b, i_h, o_c, head_dim, HEAD_DIM, VALUE_DIM, BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def gradients_kernel(
    q, k, dout, dv, gates, dmemory, dmomentum, dinitial_memory, dinitial_momentum,
    scratch, states, dus, cu_seqlens, tokens, sequences, chunk_size, parts, halvings, heads, slices,
    head_dim, value_dim, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of values and U, of the states leaving each block, and of the initial states.
    scratch holds the gradients of M, S and G."""
    i_b, i_h, o_c = share_of(heads, slices, BLOCK_V)
    start, length = span(cu_seqlens, tokens, tokens, i_b)
    o_gate = first_gate(cu_seqlens, i_b, i_h, start, tokens, heads)
    slot = slot_of(cu_seqlens, tokens, i_b, chunk_size, parts, BLOCK_T)
    o_t = tl.arange(0, BLOCK_T)
    SIZE: tl.constexpr = HEAD_DIM * VALUE_DIM
    p_dmemory = scratch + (i_b * heads + i_h) * (3 * SIZE)
    p_dmomentum = p_dmemory + SIZE
    p_dstart = p_dmemory + 2 * SIZE
    begin_state(
        p_dmemory, p_dstart, dmemory, i_b, i_h, o_c, head_dim, False, HEAD_DIM, VALUE_DIM, BLOCK_D
    )
    begin_state(
        p_dmomentum, None, dmomentum, i_b, i_h, o_c, head_dim, False, HEAD_DIM, VALUE_DIM, BLOCK_D
    )
    blocks = blocks_of(length, chunk_size, parts, BLOCK_T)
    for i_back in range(blocks):
        tl.debug_barrier()
        i = blocks - 1 - i_back
        block = block_of(i, length, chunk_size, parts, BLOCK_T)
        end = block.first + block.count
        o_row = block.first + o_t
        queries = slice_of(q, i_b, i_h, start, end)
        keys = slice_of(k, i_b, i_h, start, end)
        p_kept = kept_states(states, slot + i, i_h, heads, SIZE) + 2 * SIZE
        b_memory_k = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        b_momentum_k = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        b_pairs = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for d in range(0, head_dim, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_q = load_tile(queries, o_row, o_d, HEAD_DIM)
            b_k = load_tile(keys, o_row, o_d, HEAD_DIM)
            b_dmemory = tl.load(p_dmemory + o_tile, mask=m_tile, other=0.0)
            b_dmomentum = tl.load(p_dmomentum + o_tile, mask=m_tile, other=0.0)
            tl.store(p_kept + o_tile, b_dmemory, mask=m_tile)
            tl.store(p_kept + SIZE + o_tile, b_dmomentum, mask=m_tile)
            # K dM, K dS and Q K^T
            b_memory_k += product(b_k, b_dmemory, PRECISION)
            b_momentum_k += product(b_k, b_dmomentum, PRECISION)
            b_pairs += product(b_q, tl.trans(b_k), PRECISION)
        b_w, _, f = weigh(gates, o_gate, heads, block, o_t, False, BLOCK_T)
        b_pairs = tl.where(o_t[:, None] >= o_t[None, :], -b_w * b_pairs, 0.0)
        b_dout = load_tile(slice_of(dout, i_b, i_h, start, end), o_row, o_c, VALUE_DIM)
        # dU = -(W * Q K^T)^T dO - w_end K dM - e_end K dS
        b_du = product(tl.trans(b_pairs), b_dout, PRECISION)
        b_du -= f.w_end[:, None] * b_memory_k + f.e_end[:, None] * b_momentum_k
        store_tile(slice_of(dv, i_b, i_h, start, end), o_row, o_c, -b_du, VALUE_DIM)
        store_tile(slice_of(dus, i_b, i_h, start, end), o_row, o_c, b_du, VALUE_DIM)
        tl.debug_barrier()
        to_memory, to_momentum, stays = end_of(f, block, o_t)
        for d in range(0, head_dim, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_k = tl.trans(load_tile(keys, o_row, o_d, HEAD_DIM).to(tl.float32))
            # dG += K^T dU
            b_dstart = tl.load(p_dstart + o_tile, mask=m_tile, other=0.0)
            b_dstart += product(b_k, b_du, PRECISION)
            b_dmemory = tl.load(p_dmemory + o_tile, mask=m_tile, other=0.0)
            b_dmomentum = tl.load(p_dmomentum + o_tile, mask=m_tile, other=0.0)
            b_q = tl.trans(load_tile(queries, o_row, o_d, HEAD_DIM).to(tl.float32))
            # dS = momentum dM + kept dS + (momentum_t Q)^T dO
            b_dmomentum = to_momentum * b_dmemory + stays * b_dmomentum
            b_dmomentum += product(b_q * f.momentum[None, :], b_dout, PRECISION)
            # dM = memory dM + dG + (memory_t Q)^T dO
            b_dmemory = to_memory * b_dmemory + tl.where(block.starts, b_dstart, 0.0)
            b_dmemory += product(b_q * f.memory[None, :], b_dout, PRECISION)
            tl.store(p_dmemory + o_tile, b_dmemory, mask=m_tile)
            tl.store(p_dmomentum + o_tile, b_dmomentum, mask=m_tile)
            tl.store(p_dstart + o_tile, tl.where(block.starts, 0.0, b_dstart), mask=m_tile)
    tl.debug_barrier()
    end_state(p_dmemory, dinitial_memory, i_b, i_h, o_c, head_dim, HEAD_DIM, VALUE_DIM, BLOCK_D)
    end_state(p_dmomentum, dinitial_momentum, i_b, i_h, o_c, head_dim, HEAD_DIM, VALUE_DIM, BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def block_kernel(
    q, k, dout, dq, dk, gates, dgates, states, us, dus,
    cu_seqlens, tokens, sequences, chunk_size, parts, halvings, heads, slices, head_dim,
    value_dim, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and gates of one block."""
    i_h = tl.program_id(0) % heads
    i_slot = tl.program_id(0) // heads
    i_b = sequence_of_slot(
        i_slot, cu_seqlens, tokens, sequences, chunk_size, parts, halvings, BLOCK_T
    )
    slot = slot_of(cu_seqlens, tokens, i_b, chunk_size, parts, BLOCK_T)
    i_b = i_b.to(tl.int64)
    start, length = span(cu_seqlens, tokens, tokens, i_b)
    o_gate = first_gate(cu_seqlens, i_b, i_h, start, tokens, heads)
    index = i_slot - slot
    if (index < 0) | (index >= blocks_of(length, chunk_size, parts, BLOCK_T)):
        return
    block = block_of(index, length, chunk_size, parts, BLOCK_T)
    o_t = tl.arange(0, BLOCK_T)
    o_row = block.first + o_t
    end = block.first + block.count
    queries = slice_of(q, i_b, i_h, start, end)
    keys = slice_of(k, i_b, i_h, start, end)
    douts = slice_of(dout, i_b, i_h, start, end)
    errors = slice_of(us, i_b, i_h, start, end)
    derrors = slice_of(dus, i_b, i_h, start, end)

    b_qk = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for d in range(0, head_dim, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_q = load_tile(queries, o_row, o_d, HEAD_DIM)
        b_k = load_tile(keys, o_row, o_d, HEAD_DIM)
        b_qk += product(b_q, tl.trans(b_k), PRECISION)
    b_x = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)  # dout_t . u_j
    for c in range(0, value_dim, BLOCK_V):
        o_c = c + tl.arange(0, BLOCK_V)
        b_dout = load_tile(douts, o_row, o_c, VALUE_DIM)
        b_u = load_tile(errors, o_row, o_c, VALUE_DIM)
        b_x += product(b_dout, tl.trans(b_u), PRECISION)
    b_w, b_e, f = weigh(gates, o_gate, heads, block, o_t, True, BLOCK_T)
    m_seen = o_t[:, None] >= o_t[None, :]
    b_dw = tl.where(m_seen, -b_qk * b_x, 0.0)
    b_dqk = tl.where(m_seen, -b_w * b_x, 0.0)

    SIZE: tl.constexpr = HEAD_DIM * VALUE_DIM
    p_states = kept_states(states, i_slot, i_h, heads, SIZE)
    p_start = kept_states(states, slot + block.start_slot, i_h, heads, SIZE)
    b_dmemory = tl.zeros([BLOCK_T], tl.float32)  # gradients of the factors of M and S at each token
    b_dmomentum = tl.zeros([BLOCK_T], tl.float32)
    b_dw_end = tl.zeros([BLOCK_T], tl.float32)
    b_de_end = tl.zeros([BLOCK_T], tl.float32)
    b_of_memory = tl.zeros([BLOCK_D], tl.float32)  # gradients of end factors, per state row
    b_of_momentum = tl.zeros([BLOCK_D], tl.float32)
    b_of_kept = tl.zeros([BLOCK_D], tl.float32)
    # One loop per group of operands: a fused loop would not fit the registers.
    for d in range(0, head_dim, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        for c in range(0, value_dim, BLOCK_V):
            o_tile, m_tile = state_tile(o_d, c + tl.arange(0, BLOCK_V), HEAD_DIM, VALUE_DIM)
            b_memory = tl.load(p_states + o_tile, mask=m_tile, other=0.0)
            b_momentum = tl.load(p_states + SIZE + o_tile, mask=m_tile, other=0.0)
            b_dm = tl.load(p_states + 2 * SIZE + o_tile, mask=m_tile, other=0.0)
            b_ds = tl.load(p_states + 3 * SIZE + o_tile, mask=m_tile, other=0.0)
            b_of_memory += tl.sum(b_memory * b_dm, 1)
            b_of_momentum += tl.sum(b_momentum * b_dm, 1)
            b_of_kept += tl.sum(b_momentum * b_ds, 1)

        b_memory_q = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        b_momentum_q = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for c in range(0, value_dim, BLOCK_V):
            o_c = c + tl.arange(0, BLOCK_V)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_dout = load_tile(douts, o_row, o_c, VALUE_DIM)
            b_memory = tl.load(p_states + o_tile, mask=m_tile, other=0.0)
            # dO M^T, dO S^T
            b_memory_q += product(b_dout, tl.trans(b_memory), PRECISION)
            b_momentum = tl.load(p_states + SIZE + o_tile, mask=m_tile, other=0.0)
            b_momentum_q += product(b_dout, tl.trans(b_momentum), PRECISION)
        b_q = load_tile(queries, o_row, o_d, HEAD_DIM)
        b_k = load_tile(keys, o_row, o_d, HEAD_DIM)
        b_dmemory += tl.sum(b_memory_q * b_q.to(tl.float32), 1)
        b_dmomentum += tl.sum(b_momentum_q * b_q.to(tl.float32), 1)
        # dQ = memory_t dO M^T + momentum_t dO S^T + dQK K
        b_dq = f.memory[:, None] * b_memory_q + f.momentum[:, None] * b_momentum_q
        b_dq += product(b_dqk, b_k, PRECISION)
        store_tile(slice_of(dq, i_b, i_h, start, end), o_row, o_d, b_dq, HEAD_DIM)

        b_memory_k = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        b_momentum_k = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        b_dk = product(tl.trans(b_dqk), b_q, PRECISION)
        for c in range(0, value_dim, BLOCK_V):
            o_c = c + tl.arange(0, BLOCK_V)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_u = load_tile(errors, o_row, o_c, VALUE_DIM)
            b_dm = tl.load(p_states + 2 * SIZE + o_tile, mask=m_tile, other=0.0)
            # U dM^T, U dS^T
            b_memory_k += product(b_u, tl.trans(b_dm), PRECISION)
            b_ds = tl.load(p_states + 3 * SIZE + o_tile, mask=m_tile, other=0.0)
            b_momentum_k += product(b_u, tl.trans(b_ds), PRECISION)
        for c in range(0, value_dim, BLOCK_V):
            o_c = c + tl.arange(0, BLOCK_V)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_du = load_tile(derrors, o_row, o_c, VALUE_DIM)
            b_start = tl.load(p_start + o_tile, mask=m_tile, other=0.0)
            # dK += dU G^T
            b_dk += product(b_du, tl.trans(b_start), PRECISION)
        b_k = load_tile(keys, o_row, o_d, HEAD_DIM).to(tl.float32)
        b_dw_end -= tl.sum(b_memory_k * b_k, 1)
        b_de_end -= tl.sum(b_momentum_k * b_k, 1)
        # dK -= w_end U dM^T + e_end U dS^T
        b_dk -= f.w_end[:, None] * b_memory_k + f.e_end[:, None] * b_momentum_k
        store_tile(slice_of(dk, i_b, i_h, start, end), o_row, o_d, b_dk, HEAD_DIM)

    # Backward of the recurrences of W, E and the cumulative factors, last token first.
    b_dalpha = tl.zeros([BLOCK_T], tl.float32)
    b_deta = tl.zeros([BLOCK_T], tl.float32)
    b_dtheta = tl.zeros([BLOCK_T], tl.float32)
    b_row_w = b_dw_end
    b_row_e = b_de_end
    b_run_memory = tl.zeros([BLOCK_T], tl.float32) + tl.sum(b_of_memory, 0)
    b_run_momentum = tl.zeros([BLOCK_T], tl.float32) + tl.sum(b_of_momentum, 0)
    b_run_kept = tl.zeros([BLOCK_T], tl.float32) + tl.sum(b_of_kept, 0)
    for back in range(block.count):
        t = block.count - 1 - back
        if back > 0:
            decay = at_token(f.decay, o_t, t + 1)
            keep = at_token(f.eta, o_t, t + 1)
            b_run_memory *= decay
            b_run_momentum *= decay
            b_run_kept *= keep
            b_row_w *= decay
            b_row_e *= keep
        b_run_memory += at_token(b_dmemory, o_t, t)
        b_run_momentum += at_token(b_dmomentum, o_t, t)
        b_run_kept += b_run_momentum
        b_row_w += row_at(b_dw, o_t, t)
        b_row_e += b_row_w
        first = tl.where(o_t == 0, tl.where(back == block.count - 1, 1.0, 0.0), 0.0)
        b_da = tl.sum(tl.where(o_t < t, b_row_w * row_at(b_w, o_t, t - 1), 0.0), 0)
        b_de = tl.sum(tl.where(o_t < t, b_row_e * row_at(b_e, o_t, t - 1), 0.0), 0)
        before_memory = at_token(f.memory, o_t, t - 1) + tl.sum(first, 0)
        before_kept = at_token(f.kept, o_t, t - 1) + tl.sum(first, 0)
        b_a = b_da + b_run_memory * before_memory
        b_a += b_run_momentum * at_token(f.momentum, o_t, t - 1)
        b_dalpha = tl.where(o_t == t, -b_a, b_dalpha)
        b_deta = tl.where(o_t == t, b_de + b_run_kept * before_kept, b_deta)
        b_dtheta = tl.where(o_t == t, b_row_e, b_dtheta)
    m_row = o_t < block.count
    store_gate(dgates.alpha, o_gate, heads, o_row, m_row, b_dalpha)
    store_gate(dgates.eta, o_gate, heads, o_row, m_row, b_deta)
    store_gate(dgates.theta, o_gate, heads, o_row, m_row, b_dtheta)
