"""Nearest rows of a set for each query row. Distances are sums of squared differences; memory holds
one slab of rows at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import FLOAT_MAX, INF, INTERPRETED, launch

SLAB = 1 << 24  # max distances in memory
NOWHERE = tl.constexpr(2**31 - 1)
SIZES = ["first", "count", "rows", "tiles", "width", "set_size", "channels", "k"]


class MapRows(NamedTuple):
    """Row i of batch row b is at b batch + i // width line + i % width row; in elements."""

    data: Tensor
    batch: int
    line: int
    row: int


class Nearest(NamedTuple):
    ids: Tensor  # [B, rows, k], ascending
    distances: Tensor | None  # [B, rows, k], in the order of ids
    minimum: Tensor | None  # [B, rows]


@triton.jit
def squared_distances(p_a, m_a, p_b, m_b, channels, DEPTH: tl.constexpr):
    """Squared distances |a - b|^2 of rows at p_a and p_b, [A, B]."""
    b_sum = tl.zeros([p_a.shape[0], p_b.shape[0]], tl.float32)
    for c in range(0, channels, DEPTH):
        o_c = c + tl.arange(0, DEPTH)
        m_c = (o_c < channels)[None, :]
        b_a = tl.load(p_a[:, None] + o_c[None, :], mask=m_a[:, None] & m_c, other=0.0)
        b_b = tl.load(p_b[:, None] + o_c[None, :], mask=m_b[:, None] & m_c, other=0.0)
        b_difference = b_a.to(tl.float32)[:, None, :] - b_b.to(tl.float32)[None, :, :]
        b_sum += tl.sum(b_difference * b_difference, 2)
    return b_sum


@triton.jit(do_not_specialize=SIZES)
def distance_kernel(
    map_rows, set_rows, distances, first, count, tiles, width, set_size, channels,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Stores distances [B, count, set_size] of rows first .. first + count - 1 of each batch
    row."""
    i = tl.program_id(0)
    i_b = (i // tiles).to(tl.int64)
    o_r = i % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < count
    o_row = first + o_r
    o_y = (o_row // width).to(tl.int64)
    o_x = (o_row % width).to(tl.int64)
    p_r = map_rows.data + i_b * map_rows.batch + o_y * map_rows.line + o_x * map_rows.row
    p_out = distances + (i_b * count + o_r) * set_size
    for n in range(0, set_size, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < set_size
        p_n = set_rows.data + i_b * set_rows.batch + o_n.to(tl.int64) * set_rows.row
        b_d = squared_distances(p_r, m_r, p_n, m_n, channels, DEPTH)
        b_d = tl.where(b_d <= FLOAT_MAX, b_d, FLOAT_MAX)
        tl.store(p_out[:, None] + o_n[None, :], b_d, mask=m_r[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    distances, index, nearest, minimum, first, count, rows, tiles, set_size, k,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Selects the k smallest of each row in k passes, each of which looks past the previous one,
    and one more pass that writes them in ascending order of ids."""
    i = tl.program_id(0)
    i_b = (i // tiles).to(tl.int64)
    o_r = i % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < count
    p_row = distances + (i_b * count + o_r) * set_size
    b_last = tl.full([BLOCK_R], -INF, tl.float32)
    b_last_place = tl.full([BLOCK_R], -1, tl.int32)
    b_first = tl.full([BLOCK_R], INF, tl.float32)
    for _ in range(k):
        b_best = tl.full([BLOCK_R], INF, tl.float32)
        b_place = tl.full([BLOCK_R], NOWHERE, tl.int32)
        for n in range(0, set_size, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)[None, :]
            m_n = m_r[:, None] & (o_n < set_size)
            b_d = tl.load(p_row[:, None] + o_n, mask=m_n, other=INF)
            # only entries past the last selection, by (distance, id)
            m_beyond = b_d > b_last[:, None]
            m_beyond |= (b_d == b_last[:, None]) & (o_n > b_last_place[:, None])
            b_d = tl.where(m_beyond, b_d, INF)
            b_top = tl.min(b_d, 1)
            b_at = tl.min(tl.where(b_d == b_top[:, None], o_n, NOWHERE), 1)
            m_less = b_top < b_best
            b_best = tl.where(m_less, b_top, b_best)
            b_place = tl.where(m_less, b_at, b_place)
        b_last = b_best
        b_last_place = b_place
        b_first = tl.minimum(b_first, b_best)

    o_row = i_b * rows + first + o_r
    if minimum is not None:
        tl.store(minimum + o_row, b_first, mask=m_r)
    if nearest is None:  # k is 1
        tl.store(index + o_row, b_last_place, mask=m_r)
    else:
        b_kept = tl.zeros([BLOCK_R], tl.int32)
        for n in range(0, set_size, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)[None, :]
            m_n = m_r[:, None] & (o_n < set_size)
            b_d = tl.load(p_row[:, None] + o_n, mask=m_n, other=INF)
            m_among = b_d < b_last[:, None]
            m_among |= (b_d == b_last[:, None]) & (o_n <= b_last_place[:, None])
            b_among = (m_among & m_n).to(tl.int32)
            o_at = (o_row * k)[:, None] + b_kept[:, None] + tl.cumsum(b_among, 1) - 1
            tl.store(index + o_at, o_n + tl.zeros_like(b_among), mask=b_among != 0)
            tl.store(nearest + o_at, b_d, mask=b_among != 0)
            b_kept += tl.sum(b_among, 1)


def find_nearest(
    map_rows: MapRows,
    set_rows: MapRows,
    sizes: tuple[int, int, int, int],
    channels: int,
    k: int | None,
) -> Nearest:
    """sizes: batch, rows per batch row, width of a line, rows of the set. k None: only the nearest
    row, without distances."""
    batch, rows, width, set_size = sizes
    anchor = map_rows.data
    near = minimum = None
    if k is not None:
        near = anchor.new_empty((batch, rows, k), dtype=torch.float32)
        minimum = anchor.new_empty((batch, rows), dtype=torch.float32)
    k = k or 1
    index = anchor.new_empty((batch, rows, k), dtype=torch.int32)
    block_r, block_n, depth = (64, 64, 64) if INTERPRETED.value else (16, 16, 32)
    slab = max(min(SLAB // max(batch * set_size, 1), rows), block_r)
    distances = anchor.new_empty(batch * min(slab, rows) * set_size, dtype=torch.float32)
    for first in range(0, rows, slab):
        count = min(slab, rows - first)
        tiles = triton.cdiv(count, block_r)
        launch(distance_kernel, batch * tiles, anchor, map_rows, set_rows, distances, first, count,
               tiles, width, set_size, channels, block_r, block_n, depth)  # fmt: skip
        launch(select_kernel, batch * tiles, anchor, distances, index, near, minimum, first, count,
               rows, tiles, set_size, k, block_r, max(block_n, 32))  # fmt: skip
    return Nearest(index, near, minimum)
