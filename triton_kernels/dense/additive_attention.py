"""additive_attention: scores u_ij = v . tanh(q_i + k_j), and their gradients.

With d = g_ij v (1 - tanh^2): dq_i sums d over keys and dk_j sums d over queries. Each has its own
launch, which recomputes tanh: no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INF, launch, load_tile, store_tile, tanh

# Score tile: queries, keys, elements of A per step.
ROWS, KEYS, STEP = tl.constexpr(16), tl.constexpr(32), tl.constexpr(8)
# Gradient tile: own rows, rows reduced over, columns of A.
OWN, OTHER, WIDTH = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)
COUNTS = ["rows", "keys", "own_rows", "other_rows"]


class Rows(NamedTuple):
    """[B, S, A] with a contiguous last dimension; strides in elements."""

    data: Tensor
    batch: int
    row: int


class Pairs(NamedTuple):
    """[B, T, N]; row is the stride of the side that gets a gradient, column of the other side."""

    data: Tensor
    batch: int
    row: int
    column: int


@triton.jit
def load_pairs(pairs, i_b, o_row, o_column, m_pair, other):
    o_pair = o_row.to(tl.int64)[:, None] * pairs.row + o_column.to(tl.int64)[None, :] * pairs.column
    return tl.load(pairs.data + i_b * pairs.batch + o_pair, mask=m_pair, other=other)


@triton.jit
def load_side(side, i_b, o_row, rows, A: tl.constexpr, BLOCK: tl.constexpr, first):
    p_row = side.data + i_b * side.batch + o_row.to(tl.int64) * side.row
    return load_tile(p_row, o_row < rows, A, BLOCK, first).to(tl.float32)


@triton.jit
def load_weight(v, A: tl.constexpr, BLOCK: tl.constexpr, first):
    o_a = first + tl.arange(0, BLOCK)
    return tl.load(v + o_a, mask=o_a < A, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def scores_kernel(q, k, v, mask, scores, rows, keys, A: tl.constexpr):
    tiles_of_keys = tl.cdiv(keys, KEYS)
    tiles_of_rows = tl.cdiv(rows, ROWS)
    i = tl.program_id(0)
    o_j = i % tiles_of_keys * KEYS + tl.arange(0, KEYS)
    o_i = i // tiles_of_keys % tiles_of_rows * ROWS + tl.arange(0, ROWS)
    i_b = (i // tiles_of_keys // tiles_of_rows).to(tl.int64)
    m_pair = (o_i < rows)[:, None] & (o_j < keys)[None, :]
    b_sum = tl.zeros([ROWS, KEYS], tl.float32)
    for first in range(0, A, STEP):
        b_q = load_side(q, i_b, o_i, rows, A, STEP, first)
        b_k = load_side(k, i_b, o_j, keys, A, STEP, first)
        b_v = load_weight(v, A, STEP, first)
        # u += v . tanh(q + k)
        b_e = tanh(b_q[:, None, :] + b_k[None, :, :])  # [ROWS, KEYS, STEP]
        b_sum += tl.sum(b_e * b_v[None, None, :], 2)
    if mask is not None:
        m_seen = load_pairs(mask, i_b, o_i, o_j, m_pair, 0) != 0
        b_sum = tl.where(m_seen, b_sum, -INF)
    p_scores = scores + (i_b * rows + o_i)[:, None] * keys + o_j[None, :]
    tl.store(p_scores, b_sum, mask=m_pair)


@triton.jit(do_not_specialize=COUNTS)
def gradients_kernel(own, other, v, mask, g, d_own, dv, own_rows, other_rows, A: tl.constexpr):
    """dv: one partial per block of rows, or None."""
    steps = tl.cdiv(A, WIDTH)
    tiles = tl.cdiv(own_rows, OWN)
    i = tl.program_id(0)
    first = i % steps * WIDTH
    o_own = i // steps % tiles * OWN + tl.arange(0, OWN)
    i_b = (i // steps // tiles).to(tl.int64)
    b_own = load_side(own, i_b, o_own, own_rows, A, WIDTH, first)
    b_v = load_weight(v, A, WIDTH, first)
    b_d = tl.zeros([OWN, WIDTH], tl.float32)
    b_dv = tl.zeros([WIDTH], tl.float32)
    for begin in range(0, other_rows, OTHER):
        o_other = begin + tl.arange(0, OTHER)
        b_other = load_side(other, i_b, o_other, other_rows, A, WIDTH, first)
        m_pair = (o_own < own_rows)[:, None] & (o_other < other_rows)[None, :]
        if mask is not None:
            m_pair = m_pair & (load_pairs(mask, i_b, o_own, o_other, m_pair, 0) != 0)
        b_g = load_pairs(g, i_b, o_own, o_other, m_pair, 0.0)[:, :, None]  # [OWN, OTHER, 1]
        b_e = tanh(b_own[:, None, :] + b_other[None, :, :])  # [OWN, OTHER, WIDTH]
        # d = g v (1 - tanh^2), summed over the other side
        b_gv = b_g * b_v[None, None, :]
        m_counts = b_g != 0.0  # g = 0 masks a NaN in e
        b_d += tl.sum(tl.where(m_counts, b_gv - b_gv * b_e * b_e, 0.0), 1)
        if dv is not None:
            # dv += g tanh(q + k)
            b_dv += tl.sum(tl.sum(tl.where(m_counts, b_g * b_e, 0.0), 1), 0)
    p_d = d_own + (i_b * own_rows + o_own) * A
    store_tile(p_d, o_own < own_rows, b_d, A, first)
    if dv is not None:
        o_a = first + tl.arange(0, WIDTH)
        p_dv = dv + (i // steps).to(tl.int64) * A + o_a
        tl.store(p_dv, b_dv, mask=o_a < A)


def rows_of(t: Tensor) -> Rows:
    return Rows(t, t.stride(0), t.stride(1))


def pairs_of(t: Tensor | None, *, transposed: bool = False) -> Pairs | None:
    if t is None:
        return None
    t = t.unsqueeze(1) if t.dim() == 2 else t
    # A mask [B, N] is broadcast over queries: row stride 0.
    row, column = 0 if t.shape[1] == 1 else t.stride(1), t.stride(2)
    t = t.view(torch.uint8) if t.dtype == torch.bool else t
    return Pairs(t, t.stride(0), *((column, row) if transposed else (row, column)))


def additive_attention(a: Any) -> Tensor:
    batch, rows, width = a.q.shape
    keys = a.k.shape[1]
    scores = a.q.new_empty((batch, rows, keys), dtype=torch.float32)
    launch(
        scores_kernel,
        batch * triton.cdiv(rows, ROWS.value) * triton.cdiv(keys, KEYS.value),
        a.q,
        rows_of(a.q),
        rows_of(a.k),
        a.v_weight,
        pairs_of(a.mask),
        scores,
        rows,
        keys,
        width,
    )
    return scores


def launch_side(
    own: Tensor,
    other: Tensor,
    v_weight: Tensor,
    mask: Pairs | None,
    g: Pairs | None,
    dv: Tensor | None,
) -> Tensor:
    batch, count, width = own.shape
    gradient = own.new_empty(own.shape)
    launch(
        gradients_kernel,
        batch * triton.cdiv(count, OWN.value) * triton.cdiv(width, WIDTH.value),
        own,
        rows_of(own),
        rows_of(other),
        v_weight,
        mask,
        g,
        gradient,
        dv,
        count,
        other.shape[1],
        width,
    )
    return gradient


def additive_attention_backward(a: Any) -> tuple[Tensor, ...]:
    batch, rows, width = a.q.shape
    dv = a.q.new_empty((batch * triton.cdiv(rows, OWN.value), width), dtype=torch.float32)
    dq = launch_side(a.q, a.k, a.v_weight, pairs_of(a.mask), pairs_of(a.dscores), dv)
    g, mask = pairs_of(a.dscores, transposed=True), pairs_of(a.mask, transposed=True)
    dk = launch_side(a.k, a.q, a.v_weight, mask, g, None)
    return dq, dk, dv.sum(0).to(a.v_weight.dtype)
