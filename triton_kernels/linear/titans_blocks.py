"""Token blocks of titans_memory: their layout, and the effect of gates on states.

A block is a chunk, or a part of a chunk longer than BLOCK_T, and has a slot; slots of a sequence
start at `slot_of`. With M and S the memory and momentum at the start of the block, G the memory at
the start of its chunk, and U = K G - V, after token t

    memory   = memory_t M + momentum_t S - sum_(j <= t) W[t, j] k_j^T u_j
    momentum =              kept_t S     - sum_(j <= t) E[t, j] k_j^T u_j

Rows of W and E follow the recurrences of memory and momentum; there is no division.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common import span

# Arguments excluded from specialization: a new length does not recompile.
LENGTHS = [
    "tokens",
    "sequences",
    "chunk_size",
    "parts",
    "halvings",
    "heads",
    "slices",
    "head_dim",  # a loop bound that ptxas would unroll
    "value_dim",
]


class Gates(NamedTuple):
    """Gates per token and head, contiguous [B, S, H] or packed [T, H]."""

    alpha: Tensor
    eta: Tensor
    theta: Tensor


class Block(NamedTuple):
    first: Any  # first token of the block, in its sequence
    count: Any
    starts: Any  # true for the first block of a chunk
    start_slot: Any  # slot of the first block of its chunk, relative to its sequence


class Factors(NamedTuple):
    """[BLOCK_T] factors of the tokens of a block: decay and eta per token; memory, momentum and
    kept cumulative from the start of the block; w_end and e_end for its last token."""

    decay: Any
    eta: Any
    memory: Any
    momentum: Any
    kept: Any
    w_end: Any  # last row of W
    e_end: Any


@triton.jit
def blocks_of(length, chunk_size, parts, BLOCK_T: tl.constexpr):
    """Blocks per sequence. parts: blocks per chunk."""
    return length // chunk_size * parts + tl.cdiv(length % chunk_size, BLOCK_T)


@triton.jit
def block_of(index, length, chunk_size, parts, BLOCK_T: tl.constexpr):
    chunk = index // parts
    part = index % parts
    first = chunk * chunk_size + part * BLOCK_T
    count = tl.minimum(tl.minimum(chunk_size - part * BLOCK_T, BLOCK_T), length - first)
    return Block(first, count, part == 0, chunk * parts)


@triton.jit
def slot_of(cu_seqlens, tokens, i_b, chunk_size, parts, BLOCK_T: tl.constexpr):
    """First slot of a sequence. Packed: each sequence that begins or ends in a chunk reserves its
    parts."""
    if cu_seqlens is None:
        slot = i_b * blocks_of(tokens, chunk_size, parts, BLOCK_T)
    else:
        start, _ = span(cu_seqlens, tokens, tokens, i_b)
        slot = (start // chunk_size + i_b) * parts
    return slot


@triton.jit
def sequence_of_slot(
    i_slot, cu_seqlens, tokens, sequences, chunk_size, parts, halvings, BLOCK_T: tl.constexpr
):
    """Last sequence whose slots begin at or before i_slot."""
    if cu_seqlens is None:
        i_b = i_slot // blocks_of(tokens, chunk_size, parts, BLOCK_T)
    else:
        i_b = i_slot - i_slot
        last = i_b + sequences - 1
        for _ in range(halvings):
            middle = (i_b + last + 1) // 2
            m_after = slot_of(cu_seqlens, tokens, middle, chunk_size, parts, BLOCK_T) <= i_slot
            i_b = tl.where(m_after, middle, i_b)
            last = tl.where(m_after, last, middle - 1)
    return i_b


@triton.jit
def first_gate(cu_seqlens, i_b, i_h, start, tokens, heads):
    """Offset of a sequence and head in a contiguous [B, S, H], packed [T, H]."""
    row = tl.cast(start, tl.int64)
    if cu_seqlens is None:
        row += i_b * tokens
    return row * heads + i_h


@triton.jit
def load_gate(gate, o_gate, heads, o_row, m_row):
    return tl.load(gate + o_gate + o_row.to(tl.int64) * heads, mask=m_row, other=0.0)


@triton.jit
def store_gate(gate, o_gate, heads, o_row, m_row, b_x):
    tl.store(gate + o_gate + o_row.to(tl.int64) * heads, b_x, mask=m_row)


@triton.jit
def at_token(b_x, o_t, t):
    """Element t of [BLOCK_T]."""
    return tl.sum(tl.where(o_t == t, b_x, 0.0), 0)


@triton.jit
def row_at(b_x, o_t, t):
    """Row t of [BLOCK_T, BLOCK_T]."""
    return tl.sum(tl.where(o_t[:, None] == t, b_x, 0.0), 0)


@triton.jit
def weigh(gates, o_gate, heads, block, o_t, BOTH: tl.constexpr, BLOCK_T: tl.constexpr):
    """W [BLOCK_T, BLOCK_T], with BOTH also E, and the factors. Rows past the last token are 0."""
    m_t = o_t < block.count
    o_row = block.first + o_t
    b_decay = 1.0 - load_gate(gates.alpha, o_gate, heads, o_row, m_t)
    b_eta = load_gate(gates.eta, o_gate, heads, o_row, m_t)
    b_theta = load_gate(gates.theta, o_gate, heads, o_row, m_t)
    b_w = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    b_e = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    b_memory = tl.zeros([BLOCK_T], tl.float32)
    b_momentum = tl.zeros([BLOCK_T], tl.float32)
    b_kept = tl.zeros([BLOCK_T], tl.float32)
    b_row_w = tl.zeros([BLOCK_T], tl.float32)
    b_row_e = tl.zeros([BLOCK_T], tl.float32)
    b_run_memory = tl.full([BLOCK_T], 1.0, tl.float32)  # uniform over elements, like the next two
    b_run_momentum = tl.zeros([BLOCK_T], tl.float32)
    b_run_kept = tl.full([BLOCK_T], 1.0, tl.float32)
    for t in range(block.count):
        decay = at_token(b_decay, o_t, t)
        keep = at_token(b_eta, o_t, t)
        # E[t] = eta_t E[t-1] + theta_t, W[t] = (1 - alpha_t) W[t-1] + E[t]
        b_row_e = tl.where(o_t < t, keep * b_row_e, tl.where(o_t == t, b_theta, 0.0))
        b_row_w = tl.where(o_t < t, decay * b_row_w + b_row_e, b_row_e)
        b_run_kept *= keep
        b_run_momentum = decay * b_run_momentum + b_run_kept
        b_run_memory *= decay
        b_w = tl.where(o_t[:, None] == t, b_row_w[None, :], b_w)
        if BOTH:
            b_e = tl.where(o_t[:, None] == t, b_row_e[None, :], b_e)
        b_memory = tl.where(o_t == t, b_run_memory, b_memory)
        b_momentum = tl.where(o_t == t, b_run_momentum, b_momentum)
        b_kept = tl.where(o_t == t, b_run_kept, b_kept)
    return b_w, b_e, Factors(b_decay, b_eta, b_memory, b_momentum, b_kept, b_row_w, b_row_e)


@triton.jit
def end_of(f, block, o_t):
    """Factors memory, momentum and kept of the last token of a block."""
    last = block.count - 1
    to_memory = at_token(f.memory, o_t, last)
    to_momentum = at_token(f.momentum, o_t, last)
    return to_memory, to_momentum, at_token(f.kept, o_t, last)


@triton.jit
def state_tile(o_d, o_c, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Offsets of a tile of a state [HEAD_DIM, VALUE_DIM], and its mask."""
    m_tile = (o_d < HEAD_DIM)[:, None] & (o_c < VALUE_DIM)[None, :]
    return o_d[:, None] * VALUE_DIM + o_c[None, :], m_tile


@triton.jit
def kept_states(states, i_slot, i_h, heads, SIZE: tl.constexpr):
    """M, S and their gradients, [4, SIZE], of a block and head."""
    return states + (tl.cast(i_slot, tl.int64) * heads + i_h) * (4 * SIZE)
