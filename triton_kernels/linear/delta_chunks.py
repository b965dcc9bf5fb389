"""A chunk of the delta rule: its loads, and the operands that follow from them.

With G_i the sum of log_decay up to token i of the chunk, and S the state before it,

    M_ij = scale q_i . e^(G_i - G_j) k_j  (j <= i)     q_in_i = scale e^(G_i) q_i
    N_ij =      -k_i . e^(G_i - G_j) k_j  (j < i)      k_in_i =      -e^(G_i) k_i
                                                       k_end_j = e^(G_n - G_j) k_j

    y_i = v_i + k_in_i S + sum_j N_ij u_j              u_i = beta_i y_i
    out = q_in S + M U,   S after = e^(G_n) S + k_end^T U

Each exponent is a sum of log decays, at most 0, and no difference of two sums. The rows of U follow
from each other one by one: weights of 0 must hide what is not finite in later tokens. Without beta
there is no correction: u = v, and neither N nor k_in exists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import load_tile, product
from .titans_blocks import load_gate

MIN_LOG_DECAY = tl.constexpr(-128.0)  # e^-128 is 0 in float32
L2NORM_EPSILON = tl.constexpr(1e-6)
LOG2E = tl.constexpr(1.4426950408889634)


class Decays(NamedTuple):
    """log2 of the decays of tokens, [T, 1] per head or [T, D] per channel, and their products."""

    each: Any
    enters: Any  # e^(G_i)
    stays: Any  # e^(G_n - G_i)
    total: Any  # e^(G_n), [1] or [D]


@triton.jit
def norms_of(
    rows, o_row, head_dim, L2NORM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """[T] factors that normalize rows of q or k, 1 without L2NORM."""
    b_squares = tl.zeros([o_row.shape[0]], tl.float32)
    b_norm = b_squares + 1.0
    if L2NORM:
        for d in range(0, head_dim, BLOCK):
            b_x = load_tile(rows, o_row, d + tl.arange(0, BLOCK), HEAD_DIM).to(tl.float32)
            b_squares += tl.sum(b_x * b_x, 1)
        b_norm = 1.0 / tl.sqrt(b_squares + L2NORM_EPSILON)
    return b_norm


@triton.jit
def load_keys(rows, o_row, o_d, b_norm, HEAD_DIM: tl.constexpr):
    """Rows of q or k in float32, times factors."""
    return load_tile(rows, o_row, o_d, HEAD_DIM).to(tl.float32) * b_norm[:, None]


@triton.jit
def load_beta(beta, o_gate, heads, o_row, length):
    """[T] factors of the corrections, 1 without one."""
    b_beta = tl.full([o_row.shape[0]], 1.0, tl.float32)
    if beta is not None:
        b_beta = load_gate(beta, o_gate, heads, o_row, o_row < length)
    return b_beta


@triton.jit
def offset_of_gates(decay, o_gate, heads, o_row, o_d, DECAY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers [T, 1] or [T, D] into contiguous [..., H] or [..., H, D]."""
    o_head = (o_gate + o_row.to(tl.int64) * heads)[:, None]
    if DECAY == "channel":
        o_head = o_head * HEAD_DIM + o_d[None, :]
    return decay + o_head


@triton.jit
def load_decay(
    decay, o_gate, heads, o_row, length, o_d, DECAY: tl.constexpr, HEAD_DIM: tl.constexpr
):
    m_row = (o_row < length)[:, None]
    if DECAY == "none":
        b_x = tl.zeros([o_row.shape[0], 1], tl.float32)
    else:
        if DECAY == "channel":
            m_row = m_row & (o_d < HEAD_DIM)[None, :]
        p_decay = offset_of_gates(decay, o_gate, heads, o_row, o_d, DECAY, HEAD_DIM)
        b_x = tl.load(p_decay, mask=m_row, other=0.0)
        b_x = tl.where(b_x < MIN_LOG_DECAY, MIN_LOG_DECAY, b_x) * LOG2E
    return b_x


@triton.jit
def sums_from(b_x, o_t, j, DECAY: tl.constexpr):
    """Sums of rows j + 1 to i of [T, D] or [T, 1], in row i; 0 for i <= j."""
    if DECAY == "channel":
        b_sum = tl.cumsum(tl.where(o_t[:, None] > j, b_x, 0.0), 0)
    else:
        # Not a scan, which takes a register for each replica of a column of one element.
        m_part = (o_t[None, :] > j) & (o_t[None, :] <= o_t[:, None])
        b_sum = tl.sum(tl.where(m_part, tl.sum(b_x, 1)[None, :], 0.0), 1)[:, None]
    return b_sum


@triton.jit
def sums_to_end(b_x, o_t, DECAY: tl.constexpr):
    """Sums of rows i to the last, in row i."""
    if DECAY == "channel":
        b_sum = tl.cumsum(b_x, 0, reverse=True)
    else:
        m_part = o_t[None, :] >= o_t[:, None]
        b_sum = tl.sum(tl.where(m_part, tl.sum(b_x, 1)[None, :], 0.0), 1)[:, None]
    return b_sum


@triton.jit
def decays_of(
    decay, o_gate, heads, o_row, length, o_d, DECAY: tl.constexpr, HEAD_DIM: tl.constexpr
):
    b_each = load_decay(decay, o_gate, heads, o_row, length, o_d, DECAY, HEAD_DIM)
    # The rows of a chunk that the next token begins: sums of these leave out the token's own decay.
    m_last = o_row[:, None] == tl.max(o_row, 0)
    b_next = load_decay(decay, o_gate, heads, o_row + 1, length, o_d, DECAY, HEAD_DIM)
    b_next = tl.where(m_last, 0.0, b_next)
    o_t = o_row - tl.min(o_row, 0)
    return Decays(
        b_each,
        tl.exp2(sums_from(b_each, o_t, -1, DECAY)),
        tl.exp2(sums_to_end(b_next, o_t, DECAY)),
        tl.exp2(tl.sum(b_each, 0)),
    )


@triton.jit
def after(b_each, o_t, j, DECAY: tl.constexpr):
    """e^(G_i - G_j) of tokens i >= j, 0 before."""
    return tl.where(o_t[:, None] >= j, tl.exp2(sums_from(b_each, o_t, j, DECAY)), 0.0)


@triton.jit
def row_of(b_x, o_t, i):
    """Row i of [T, columns]."""
    return tl.sum(tl.where(o_t[:, None] == i, b_x, 0.0), 0)


@triton.jit
def column_of(b_x, o_t, j):
    """Column j of [rows, T]."""
    return tl.sum(tl.where(o_t[None, :] == j, b_x, 0.0), 1)


@triton.jit
def products_of(
    b_q, b_k, b_each, o_t, count,
    CORRECTS: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q_i . e^(G_i - G_j) k_j and k_i . e^(G_i - G_j) k_j over some channels, without the factor if
    it is the same for all channels; 0 instead of the second if not CORRECTS, and decays are per
    channel."""
    if DECAY == "channel":
        b_m = tl.zeros([o_t.shape[0], o_t.shape[0]], tl.float32)
        b_n = tl.zeros([o_t.shape[0], o_t.shape[0]], tl.float32)
        for j in range(count):
            b_key = after(b_each, o_t, j, DECAY) * row_of(b_k, o_t, j)[None, :]
            m_column = o_t[None, :] == j
            b_m = tl.where(m_column, tl.sum(b_q * b_key, 1)[:, None], b_m)
            if CORRECTS:
                b_n = tl.where(m_column, tl.sum(b_k * b_key, 1)[:, None], b_n)
    else:
        b_m = product(b_q, tl.trans(b_k), PRECISION)
        b_n = product(b_k, tl.trans(b_k), PRECISION)
    return b_m, b_n


@triton.jit
def pair_decay(b_each, o_t, count, DECAY: tl.constexpr):
    """e^(G_i - G_j) of a decay per head, [i, j] for i >= j, both below count."""
    b_pair = tl.full([o_t.shape[0], o_t.shape[0]], 1.0, tl.float32)
    if DECAY == "head":
        for j in range(count):
            b_pair = tl.where(o_t[None, :] == j, after(b_each, o_t, j, DECAY), b_pair)
    return b_pair


@triton.jit
def pairs_of(b_m, b_n, b_each, o_t, count, scale, DECAY: tl.constexpr):
    """M and N from products over all channels; b_each [T, 1] if the decay is per head."""
    if DECAY != "channel":
        b_pair = pair_decay(b_each, o_t, count, DECAY)
        b_m *= b_pair
        b_n *= b_pair
    b_m = tl.where(o_t[:, None] >= o_t[None, :], scale * b_m, 0.0)
    return b_m, tl.where(o_t[:, None] > o_t[None, :], -b_n, 0.0)
