"""Kernels of delta_attention. The first two iterate over the chunks of a sequence, one forward and
one in reverse, for a slice of the value columns of a head, independent of other columns. The third
handles one chunk of one head, independent of other chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import slice_of, span
from .common import chunk_of, first_slot, load_tile, product, rows_of, store_tile
from .delta_chunks import (
    after,
    column_of,
    decays_of,
    load_beta,
    load_decay,
    load_keys,
    norms_of,
    offset_of_gates,
    pair_decay,
    pairs_of,
    products_of,
    row_of,
    sums_to_end,
)
from .titans_blocks import at_token, first_gate, state_tile, store_gate
from .titans_memory_kernels import begin_state, end_state, share_of

# Arguments excluded from specialization: a new length does not recompile.
LENGTHS = [
    "tokens",
    "sequences",
    "per_sequence",
    "halvings",
    "heads",
    "group",
    "slices",
    "head_dim",  # loop bounds that ptxas would unroll
    "value_dim",
]


@triton.jit
def state_of_slot(states, slot, i_h, heads, SIZE: tl.constexpr):
    return states + (tl.cast(slot, tl.int64) * heads + i_h) * SIZE


@triton.jit(do_not_specialize=LENGTHS)
def states_kernel(
    q, k, v, out, beta, decay, initial, final, scratch, states, ys, cu_seqlens, tokens, sequences,
    per_sequence, halvings, heads, group, slices, head_dim, value_dim, scale,
    KEEP: tl.constexpr, L2NORM: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out and the final states; KEEP: the states before chunks and Y instead, for the backward."""
    i_b, i_h, o_c = share_of(heads, slices, BLOCK_V)
    start, length = span(cu_seqlens, tokens, tokens, i_b)
    o_gate = first_gate(cu_seqlens, i_b, i_h, start, tokens, heads)
    slot = first_slot(cu_seqlens, tokens, i_b, per_sequence, BLOCK_T)
    SIZE: tl.constexpr = HEAD_DIM * VALUE_DIM
    p_state = state_of_slot(scratch, i_b, i_h, heads, SIZE)
    begin_state(
        p_state, None, initial, i_b, i_h, o_c, head_dim, False, HEAD_DIM, VALUE_DIM, BLOCK_D
    )
    o_t = tl.arange(0, BLOCK_T)
    queries = slice_of(q, i_b, i_h // group, start, length)
    keys = slice_of(k, i_b, i_h // group, start, length)
    values = slice_of(v, i_b, i_h, start, length)
    for first in range(0, length, BLOCK_T):
        tl.debug_barrier()  # makes stores of other threads visible
        o_row = first + o_t
        count = tl.minimum(length - first, BLOCK_T)
        b_q_norm = norms_of(queries, o_row, head_dim, L2NORM, HEAD_DIM, BLOCK_D)
        b_k_norm = norms_of(keys, o_row, head_dim, L2NORM, HEAD_DIM, BLOCK_D)
        b_beta = load_beta(beta, o_gate, heads, o_row, length)
        p_kept = p_state
        if KEEP:
            p_kept = state_of_slot(states, slot + first // BLOCK_T, i_h, heads, SIZE)
        b_m = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        b_n = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        b_y = load_tile(values, o_row, o_c, VALUE_DIM).to(tl.float32)
        b_out = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for d in range(0, head_dim, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_q = load_keys(queries, o_row, o_d, b_q_norm, HEAD_DIM)
            b_k = load_keys(keys, o_row, o_d, b_k_norm, HEAD_DIM)
            f = decays_of(decay, o_gate, heads, o_row, length, o_d, DECAY, HEAD_DIM)
            b_more_m, b_more_n = products_of(
                b_q, b_k, f.each, o_t, count, beta is not None, DECAY, PRECISION
            )
            b_m += b_more_m
            b_n += b_more_n
            b_s = tl.load(p_state + o_tile, mask=m_tile, other=0.0)
            if KEEP:
                tl.store(p_kept + o_tile, b_s, mask=m_tile)
            if beta is not None:
                b_y -= product(b_k * f.enters, b_s, PRECISION)
            b_out += product(b_q * (scale * f.enters), b_s, PRECISION)
        b_each = load_decay(decay, o_gate, heads, o_row, length, o_t, DECAY, HEAD_DIM)
        b_m, b_n = pairs_of(b_m, b_n, b_each, o_t, count, scale, DECAY)
        b_u = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for i in range(count):
            b_row = (row_of(b_y, o_t, i) * at_token(b_beta, o_t, i))[None, :]
            if beta is not None:
                b_more = column_of(b_n, o_t, i)[:, None] * b_row
                b_y = tl.where(o_t[:, None] > i, b_y + b_more, b_y)
                b_u = tl.where(o_t[:, None] == i, b_row, b_u)
            b_more = column_of(b_m, o_t, i)[:, None] * b_row
            b_out = tl.where(o_t[:, None] >= i, b_out + b_more, b_out)
        if beta is None:
            b_u = b_y
        if KEEP:
            if beta is not None:
                store_tile(slice_of(ys, i_b, i_h, start, length), o_row, o_c, b_y, VALUE_DIM)
        else:
            store_tile(slice_of(out, i_b, i_h, start, length), o_row, o_c, b_out, VALUE_DIM)
        tl.debug_barrier()
        for d in range(0, head_dim, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_k = load_keys(keys, o_row, o_d, b_k_norm, HEAD_DIM)
            f = decays_of(decay, o_gate, heads, o_row, length, o_d, DECAY, HEAD_DIM)
            b_s = f.total[:, None] * tl.load(p_state + o_tile, mask=m_tile, other=0.0)
            b_s += product(tl.trans(b_k * f.stays), b_u, PRECISION)
            tl.store(p_state + o_tile, b_s, mask=m_tile)
    tl.debug_barrier()
    end_state(p_state, final, i_b, i_h, o_c, head_dim, HEAD_DIM, VALUE_DIM, BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def gradients_kernel(
    q, k, dout, dv, beta, decay, dfinal, dinitial, scratch, dstates, ys, dys, dbetas, cu_seqlens,
    tokens, sequences, per_sequence, halvings, heads, group, slices, head_dim, value_dim, scale,
    L2NORM: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dv, dY, the part of dbeta of these columns, and the gradients of the states after chunks."""
    i_b, i_h, o_c = share_of(heads, slices, BLOCK_V)
    start, length = span(cu_seqlens, tokens, tokens, i_b)
    o_gate = first_gate(cu_seqlens, i_b, i_h, start, tokens, heads)
    slot = first_slot(cu_seqlens, tokens, i_b, per_sequence, BLOCK_T)
    SIZE: tl.constexpr = HEAD_DIM * VALUE_DIM
    p_dstate = state_of_slot(scratch, i_b, i_h, heads, SIZE)
    begin_state(
        p_dstate, None, dfinal, i_b, i_h, o_c, head_dim, False, HEAD_DIM, VALUE_DIM, BLOCK_D
    )
    o_t = tl.arange(0, BLOCK_T)
    queries = slice_of(q, i_b, i_h // group, start, length)
    keys = slice_of(k, i_b, i_h // group, start, length)
    chunks = tl.cdiv(length, BLOCK_T)
    for back in range(chunks):
        tl.debug_barrier()  # makes stores of other threads visible
        index = chunks - 1 - back
        o_row = index * BLOCK_T + o_t
        count = tl.minimum(length - index * BLOCK_T, BLOCK_T)
        b_q_norm = norms_of(queries, o_row, head_dim, L2NORM, HEAD_DIM, BLOCK_D)
        b_k_norm = norms_of(keys, o_row, head_dim, L2NORM, HEAD_DIM, BLOCK_D)
        b_beta = load_beta(beta, o_gate, heads, o_row, length)
        p_kept = state_of_slot(dstates, slot + index, i_h, heads, SIZE)
        b_m = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        b_n = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        b_du = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for d in range(0, head_dim, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_q = load_keys(queries, o_row, o_d, b_q_norm, HEAD_DIM)
            b_k = load_keys(keys, o_row, o_d, b_k_norm, HEAD_DIM)
            f = decays_of(decay, o_gate, heads, o_row, length, o_d, DECAY, HEAD_DIM)
            b_more_m, b_more_n = products_of(
                b_q, b_k, f.each, o_t, count, beta is not None, DECAY, PRECISION
            )
            b_m += b_more_m
            b_n += b_more_n
            b_ds = tl.load(p_dstate + o_tile, mask=m_tile, other=0.0)
            tl.store(p_kept + o_tile, b_ds, mask=m_tile)
            b_du += product(b_k * f.stays, b_ds, PRECISION)
        b_each = load_decay(decay, o_gate, heads, o_row, length, o_t, DECAY, HEAD_DIM)
        b_m, b_n = pairs_of(b_m, b_n, b_each, o_t, count, scale, DECAY)
        b_dout = load_tile(slice_of(dout, i_b, i_h, start, length), o_row, o_c, VALUE_DIM)
        b_dout = b_dout.to(tl.float32)
        # dU = M^T dO + k_end dS
        b_du += product(tl.trans(b_m), b_dout, PRECISION)
        if beta is None:
            b_dy = b_du
        else:
            b_dy = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
            for i in range(count):
                j = count - 1 - i
                b_row = (row_of(b_du, o_t, j) * at_token(b_beta, o_t, j))[None, :]
                b_more = row_of(b_n, o_t, j)[:, None] * b_row
                b_du = tl.where(o_t[:, None] < j, b_du + b_more, b_du)
                b_dy = tl.where(o_t[:, None] == j, b_row, b_dy)
        store_tile(slice_of(dv, i_b, i_h, start, length), o_row, o_c, b_dy, VALUE_DIM)
        if beta is not None:
            store_tile(slice_of(dys, i_b, i_h, start, length), o_row, o_c, b_dy, VALUE_DIM)
            b_y = load_tile(slice_of(ys, i_b, i_h, start, length), o_row, o_c, VALUE_DIM)
            p_dbeta = dbetas.data + (tl.program_id(0) % slices).to(tl.int64) * dbetas.sequence
            store_gate(p_dbeta, o_gate, heads, o_row, o_row < length, tl.sum(b_du * b_y, 1))
        tl.debug_barrier()
        for d in range(0, head_dim, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
            b_q = load_keys(queries, o_row, o_d, b_q_norm, HEAD_DIM)
            b_k = load_keys(keys, o_row, o_d, b_k_norm, HEAD_DIM)
            f = decays_of(decay, o_gate, heads, o_row, length, o_d, DECAY, HEAD_DIM)
            # dS = e^(G_n) dS' + q_in^T dO + k_in^T dY
            b_ds = f.total[:, None] * tl.load(p_dstate + o_tile, mask=m_tile, other=0.0)
            b_ds += product(tl.trans(b_q * (scale * f.enters)), b_dout, PRECISION)
            if beta is not None:
                b_ds -= product(tl.trans(b_k * f.enters), b_dy, PRECISION)
            tl.store(p_dstate + o_tile, b_ds, mask=m_tile)
    tl.debug_barrier()
    end_state(p_dstate, dinitial, i_b, i_h, o_c, head_dim, HEAD_DIM, VALUE_DIM, BLOCK_D)


@triton.jit
def gradients_of_pairs(
    douts, dys, ys, o_row, b_beta, value_dim,
    PRECISION: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dM = dO U^T and dN = dY U^T; 0 without dY."""
    b_dm = tl.zeros([o_row.shape[0], o_row.shape[0]], tl.float32)
    b_dn = tl.zeros([o_row.shape[0], o_row.shape[0]], tl.float32)
    for c in range(0, value_dim, BLOCK_V):
        o_c = c + tl.arange(0, BLOCK_V)
        b_u = load_tile(ys, o_row, o_c, VALUE_DIM).to(tl.float32) * b_beta[:, None]
        b_dout = load_tile(douts, o_row, o_c, VALUE_DIM).to(tl.float32)
        b_dm += product(b_dout, tl.trans(b_u), PRECISION)
        if dys is not None:
            b_dn += product(load_tile(dys, o_row, o_c, VALUE_DIM), tl.trans(b_u), PRECISION)
    return b_dm, b_dn


@triton.jit
def gradients_of_states(
    douts, dys, ys, o_row, o_d, b_beta, p_state, p_dstate, value_dim, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dO S^T, -dY S^T, U dS^T, and the products of S and dS summed over columns."""
    b_dq = tl.zeros([o_row.shape[0], o_d.shape[0]], tl.float32)
    b_dk = tl.zeros([o_row.shape[0], o_d.shape[0]], tl.float32)
    b_dk_end = tl.zeros([o_row.shape[0], o_d.shape[0]], tl.float32)
    b_state = tl.zeros([o_d.shape[0]], tl.float32)
    for c in range(0, value_dim, BLOCK_V):
        o_c = c + tl.arange(0, BLOCK_V)
        o_tile, m_tile = state_tile(o_d, o_c, HEAD_DIM, VALUE_DIM)
        b_s = tl.load(p_state + o_tile, mask=m_tile, other=0.0)
        b_dout = load_tile(douts, o_row, o_c, VALUE_DIM).to(tl.float32)
        b_dq += product(b_dout, tl.trans(b_s), PRECISION)
        if dys is not None:
            b_dk -= product(load_tile(dys, o_row, o_c, VALUE_DIM), tl.trans(b_s), PRECISION)
        b_ds = tl.load(p_dstate + o_tile, mask=m_tile, other=0.0)
        b_u = load_tile(ys, o_row, o_c, VALUE_DIM).to(tl.float32) * b_beta[:, None]
        b_dk_end += product(b_u, tl.trans(b_ds), PRECISION)
        b_state += tl.sum(b_s * b_ds, 1)
    return b_dq, b_dk, b_dk_end, b_state


@triton.jit
def add_channels(b_q, b_k, b_dq, b_dk, b_dg, b_end, b_dm, b_dn, b_each, o_t, count, scale):
    """Adds what pairs of tokens give to the gradients of some channels; b_end: what keys in the
    state after the chunk give to dg of later tokens."""
    for j in range(count):
        m_later = o_t[:, None] > j
        b_key = row_of(b_k, o_t, j)[None, :]
        b_weight = tl.where(m_later, after(b_each, o_t, j, "channel"), 0.0)
        b_of_q = scale * column_of(b_dm, o_t, j)[:, None] * b_weight
        b_of_k = -column_of(b_dn, o_t, j)[:, None] * b_weight
        b_of_key = tl.where(m_later, b_of_q * b_q + b_of_k * b_k, 0.0)
        b_dq += tl.where(m_later, b_of_q * b_key, 0.0)
        b_dk += tl.where(m_later, b_of_k * b_key, 0.0)
        b_dk = tl.where(o_t[:, None] == j, b_dk + tl.sum(b_of_key, 0)[None, :], b_dk)
        b_pairs = sums_to_end(b_of_key * b_key, o_t, "channel")
        b_dg += tl.where(m_later, b_pairs + row_of(b_end, o_t, j)[None, :], 0.0)
    return b_dq, b_dk, b_dg


@triton.jit
def add_pairs(
    queries, keys, dq, dk, o_row, b_q_norm, b_k_norm, b_of_q, b_of_k, head_dim,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds what pairs of tokens give to stored gradients, with gradients b_of_q and b_of_k of their
    products; returns the weights times gradients of the pairs. A loop of its own: with the products
    of states, the operands would not fit the registers."""
    b_crossing = tl.zeros(b_of_q.shape, tl.float32)
    for d in range(0, head_dim, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_q = load_keys(queries, o_row, o_d, b_q_norm, HEAD_DIM)
        b_k = load_keys(keys, o_row, o_d, b_k_norm, HEAD_DIM)
        b_crossing += b_of_q * product(b_q, tl.trans(b_k), PRECISION)
        b_crossing += b_of_k * product(b_k, tl.trans(b_k), PRECISION)
        b_dq = load_tile(dq, o_row, o_d, HEAD_DIM)
        store_tile(dq, o_row, o_d, b_dq + product(b_of_q, b_k, PRECISION), HEAD_DIM)
        b_dk = load_tile(dk, o_row, o_d, HEAD_DIM)
        b_dk += product(b_of_k, b_k, PRECISION)
        b_dk += product(tl.trans(b_of_q), b_q, PRECISION)
        b_dk += product(tl.trans(b_of_k), b_k, PRECISION)
        store_tile(dk, o_row, o_d, b_dk, HEAD_DIM)
    return b_crossing


@triton.jit(do_not_specialize=LENGTHS)
def chunk_kernel(
    q, k, dout, dq, dk, beta, decay, ddecay, states, dstates, ys, dys, cu_seqlens, tokens,
    sequences, per_sequence, halvings, heads, group, slices, head_dim, value_dim, scale,
    L2NORM: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of the (normalized) queries and keys of a value head, and of log_decay. ys: v
    without a correction."""
    i_h = tl.program_id(0) % heads
    i_slot = tl.program_id(0) // heads
    chunk = chunk_of(i_slot, cu_seqlens, tokens, sequences, per_sequence, halvings, heads, BLOCK_T)
    if chunk.count <= 0:
        return
    o_t = tl.arange(0, BLOCK_T)
    o_row = chunk.first + o_t
    m_row = o_row < chunk.length
    o_gate = first_gate(cu_seqlens, chunk.batch, i_h, chunk.start, tokens, heads)
    queries, keys = rows_of(q, chunk, i_h // group), rows_of(k, chunk, i_h // group)
    douts, ys_of = rows_of(dout, chunk, i_h), rows_of(ys, chunk, i_h)
    dys_of = None
    if dys is not None:
        dys_of = rows_of(dys, chunk, i_h)
    b_q_norm = norms_of(queries, o_row, head_dim, L2NORM, HEAD_DIM, BLOCK_D)
    b_k_norm = norms_of(keys, o_row, head_dim, L2NORM, HEAD_DIM, BLOCK_D)
    b_beta = load_beta(beta, o_gate, heads, o_row, chunk.length)
    p_state = state_of_slot(states, i_slot, i_h, heads, HEAD_DIM * VALUE_DIM)
    p_dstate = state_of_slot(dstates, i_slot, i_h, heads, HEAD_DIM * VALUE_DIM)

    b_dm, b_dn = gradients_of_pairs(
        douts, dys_of, ys_of, o_row, b_beta, value_dim, PRECISION, VALUE_DIM, BLOCK_V
    )
    b_own = scale * tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_dm, 0.0), 1)[:, None]

    m_later = o_t[:, None] > o_t[None, :]
    if DECAY != "channel":
        b_ended = tl.zeros([BLOCK_T], tl.float32)
        b_dg = tl.zeros([BLOCK_T, 1], tl.float32)
    for d in range(0, head_dim, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_q = load_keys(queries, o_row, o_d, b_q_norm, HEAD_DIM)
        b_k = load_keys(keys, o_row, o_d, b_k_norm, HEAD_DIM)
        f = decays_of(decay, o_gate, heads, o_row, chunk.length, o_d, DECAY, HEAD_DIM)
        b_dq, b_dk, b_dk_end, b_state = gradients_of_states(
            douts, dys_of, ys_of, o_row, o_d, b_beta, p_state, p_dstate, value_dim, PRECISION,
            HEAD_DIM, VALUE_DIM, BLOCK_V,
        )  # fmt: skip
        b_dq *= scale * f.enters
        b_dk *= f.enters
        b_dk_end *= f.stays

        # log_decay of token t is in the weights of all j < t <= i, of the state before and after.
        b_entered = b_q * b_dq + b_k * b_dk
        b_end = b_k * b_dk_end
        b_dk += b_dk_end
        if DECAY == "channel":
            b_dg = sums_to_end(b_entered, o_t, DECAY) + (f.total * b_state)[None, :]
            b_dq, b_dk, b_dg = add_channels(
                b_q, b_k, b_dq, b_dk, b_dg, b_end, b_dm, b_dn, f.each, o_t, chunk.count, scale
            )
            if ddecay is not None:
                p_decay = offset_of_gates(ddecay, o_gate, heads, o_row, o_d, DECAY, HEAD_DIM)
                m_decay = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
                tl.store(p_decay, b_dg, mask=m_decay)
        else:
            b_dg += sums_to_end(b_entered, o_t, DECAY) + tl.sum(f.total * b_state, 0)
            b_ended += tl.sum(b_end, 1)
        store_tile(rows_of(dq, chunk, i_h), o_row, o_d, b_dq + b_own * b_k, HEAD_DIM)
        store_tile(rows_of(dk, chunk, i_h), o_row, o_d, b_dk + b_own * b_q, HEAD_DIM)
    if DECAY != "channel":
        tl.debug_barrier()  # makes stores of other threads visible
        b_each = load_decay(decay, o_gate, heads, o_row, chunk.length, o_t, DECAY, HEAD_DIM)
        b_pair = tl.where(m_later, pair_decay(b_each, o_t, chunk.count, DECAY), 0.0)
        b_crossing = add_pairs(
            queries, keys, rows_of(dq, chunk, i_h), rows_of(dk, chunk, i_h), o_row, b_q_norm,
            b_k_norm, scale * b_dm * b_pair, -b_dn * b_pair, head_dim, PRECISION, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        if ddecay is not None:
            b_dg += tl.sum(tl.where(m_later, b_ended[None, :], 0.0), 1)[:, None]
            # Sums over i >= t, then over j < t.
            m_from = tl.where(o_t[None, :] >= o_t[:, None], 1.0, 0.0)
            b_pairs = product(m_from, b_crossing, PRECISION)
            b_dg += tl.sum(tl.where(m_later, b_pairs, 0.0), 1)[:, None]
            store_gate(ddecay, o_gate, heads, o_row, m_row, tl.sum(b_dg, 1))
