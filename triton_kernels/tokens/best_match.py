"""best_match: a program owns some rows of a, loops over all rows of b and keeps the maximum
product."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import FLOAT_MAX, INF, Rows, dot, launch

BLOCK = 64  # rows of a and rows of b per tile
PIECE_BYTES = 128  # bytes of a row per step
FACTOR_ROWS = 16
FLOAT_TINY = tl.constexpr(1.1754943508222875e-38)
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def load_piece(rows, i_b, o_row, m_row, o_d, m_d):
    p_row = rows.data + i_b * rows.batch + o_row.to(tl.int64) * rows.seq
    return tl.load(p_row[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)


@triton.jit(do_not_specialize=["count", "tiles", "channels"])
def factor_kernel(
    rows, factors, count, tiles, channels, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """1 / norm of each row; 0 for a zero row, NaN for a row that is not finite."""
    i = tl.program_id(0)
    i_b = (i // tiles).to(tl.int64)
    o_row = i % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < count
    b_squares = tl.zeros([BLOCK_R], tl.float32)
    for d in range(0, channels, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_x = load_piece(rows, i_b, o_row, m_row, o_d, o_d < channels).to(tl.float32)
        b_squares += tl.sum(b_x * b_x, 1)
    m_some = b_squares >= FLOAT_TINY
    b_factor = tl.where(m_some, 1.0 / tl.sqrt(tl.where(m_some, b_squares, 1.0)), 0.0)
    b_factor = tl.where(b_squares <= FLOAT_MAX, b_factor, float("nan"))
    tl.store(factors + i_b * count + o_row, b_factor, mask=m_row)


@triton.jit(do_not_specialize=["count", "partners", "tiles", "channels"])
def match_kernel(
    rows_a, rows_b, factors_a, factors_b, index, score, count, partners, tiles, channels,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_b = (i // tiles).to(tl.int64)
    o_m = i % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < count
    b_best = tl.full([BLOCK_M], -INF, tl.float32)
    b_index = tl.zeros([BLOCK_M], tl.int32)
    if factors_a is not None:
        b_factor_a = tl.load(factors_a + i_b * count + o_m, mask=m_m, other=0.0)
    for n in range(0, partners, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < partners
        b_z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(0, channels, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            b_a = load_piece(rows_a, i_b, o_m, m_m, o_d, o_d < channels)
            b_b = load_piece(rows_b, i_b, o_n, m_n, o_d, o_d < channels)
            # Z = A B^T
            b_z += dot(b_a, tl.trans(b_b))
        if factors_a is not None:
            b_factor_b = tl.load(factors_b + i_b * partners + o_n, mask=m_n, other=0.0)
            b_z = b_z * b_factor_b[None, :] * b_factor_a[:, None]
        b_z = tl.where(m_n[None, :] & (b_z == b_z), b_z, -INF)
        b_top = tl.max(b_z, 1)
        b_place = tl.min(tl.where(b_z == b_top[:, None], o_n[None, :], NOWHERE), 1)
        m_greater = b_top > b_best
        b_best = tl.where(m_greater, b_top, b_best)
        b_index = tl.where(m_greater, b_place, b_index)
    b_index = tl.where(partners > 0, b_index, -1)
    o_out = i_b * count + o_m
    tl.store(index + o_out, b_index, mask=m_m)
    tl.store(score + o_out, b_best, mask=m_m)


def best_match(record: Any) -> tuple[Tensor, Tensor]:
    a, b = record.a, record.b
    batch, count, channels = a.shape
    partners = b.shape[1]
    index = a.new_empty((batch, count), dtype=torch.int32)
    score = a.new_empty((batch, count), dtype=torch.float32)
    piece = min(max(triton.next_power_of_2(channels), 16), PIECE_BYTES // a.element_size())
    factors: list[Tensor | None] = [None, None]
    rows = [Rows(x, x.stride(0), x.stride(1), 0) for x in (a, b)]
    if record.normalize:
        for i, x in enumerate((a, b)):
            factors[i] = a.new_empty(x.shape[:2], dtype=torch.float32)
            tiles = triton.cdiv(x.shape[1], FACTOR_ROWS)
            launch(factor_kernel, batch * tiles, a, rows[i], factors[i], x.shape[1], tiles,
                   channels, FACTOR_ROWS, piece)  # fmt: skip
    tiles = triton.cdiv(count, BLOCK)
    launch(match_kernel, batch * tiles, a, *rows, *factors, index, score, count, partners, tiles,
           channels, BLOCK, BLOCK, piece, num_warps=8 if a.element_size() == 4 else 4)  # fmt: skip
    return index, score
