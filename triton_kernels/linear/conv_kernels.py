"""Kernels of the causal convolutions: a program owns a tile of tokens and channels.

All tokens of a call are rows of one list; each finds its sequence and its position there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common import LOG2E, rounded
from .common import load_request

# Arguments excluded from specialization: a new length does not recompile.
LENGTHS = ["rows", "seqlen", "sequences", "halvings", "slices", "channels"]


class TokenRows(NamedTuple):
    """[B, T, C] (packed: [T, C], batch = 0) with contiguous channels; strides in elements."""

    data: Tensor
    batch: int
    seq: int


class ConvStates(NamedTuple):
    """[N, C, K], the newest input last."""

    data: Tensor
    sequence: int
    channel: int
    column: int


class Filter(NamedTuple):
    weight: Tensor
    channel: int
    tap: int
    bias: Tensor | None
    bias_channel: int


class Where(NamedTuple):
    """Sequence, first row and length of the sequence of each row, and its position in it."""

    b: Any
    start: Any
    length: Any
    position: Any


@triton.jit
def place(o_row, cu_seqlens, rows, seqlen, sequences, halvings):
    if cu_seqlens is None:
        b = o_row // tl.maximum(seqlen, 1)
        start = b * seqlen
        length = tl.zeros_like(b) + seqlen
    else:
        # The last sequence that begins at or before the row.
        b = tl.zeros_like(o_row)
        b_high = b + sequences
        for _ in range(halvings):
            b_middle = (b + b_high) // 2
            m_after = tl.load(cu_seqlens + b_middle, mask=b_high > b + 1, other=0) > o_row
            m_open = b_high > b + 1
            b_high = tl.where(m_open & m_after, b_middle, b_high)
            b = tl.where(m_open & (m_after == 0), b_middle, b)
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), o_row)
        end = tl.minimum(tl.load(cu_seqlens + b + 1), rows)
        length = tl.maximum(end, o_row + 1) - start
    return Where(b, start, length, o_row - start)


@triton.jit
def load_rows(tokens, where, o_row, o_c, m_tile, cu_seqlens):
    """Rows o_row, which lie in the sequences of `where`, in float32."""
    if cu_seqlens is None:
        o_first = where.b.to(tl.int64) * tokens.batch
        o_first += (o_row - where.start).to(tl.int64) * tokens.seq
    else:
        o_first = o_row.to(tl.int64) * tokens.seq
    p_tile = tokens.data + o_first[:, None] + o_c[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def store_rows(tokens, where, o_row, o_c, m_tile, cu_seqlens, b_x):
    if cu_seqlens is None:
        o_first = where.b.to(tl.int64) * tokens.batch
        o_first += (o_row - where.start).to(tl.int64) * tokens.seq
    else:
        o_first = o_row.to(tl.int64) * tokens.seq
    p_tile = tokens.data + o_first[:, None] + o_c[None, :]
    tl.store(p_tile, rounded(b_x, tokens.data.dtype.element_ty), mask=m_tile)


@triton.jit
def load_input(
    x, state, where, o_row, o_c, m_tile, back: tl.constexpr, cu_seqlens, WIDTH: tl.constexpr
):
    """Inputs `back` tokens before rows o_row; before their sequences those of the state, or 0."""
    m_own = (where.position >= back)[:, None] & m_tile
    b_x = load_rows(x, where, o_row - back, o_c, m_own, cu_seqlens)
    if state is not None and back > 0:
        m_before = (where.position < back)[:, None] & m_tile
        o_state = where.b.to(tl.int64) * state.sequence
        o_state += (WIDTH - 1 + where.position - back).to(tl.int64) * state.column
        p_state = state.data + o_state[:, None] + (o_c.to(tl.int64) * state.channel)[None, :]
        b_x += tl.load(p_state, mask=m_before, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def load_tap(taps, j: tl.constexpr, o_c, m_c):
    p_tap = taps.weight + o_c.to(tl.int64) * taps.channel + j * taps.tap
    return tl.load(p_tap, mask=m_c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_bias(taps, o_c, m_c, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    b_sum = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if taps.bias is not None:
        p_bias = taps.bias + o_c.to(tl.int64) * taps.bias_channel
        b_sum += tl.load(p_bias, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_sum


@triton.jit
def sigmoid(b_x):
    return 1.0 / (1.0 + tl.exp2(b_x * -LOG2E))


@triton.jit
def tile_of(rows, channels, slices, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    i_tile = tl.program_id(0) // slices
    o_row = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = (tl.program_id(0) % slices) * BLOCK_C + tl.arange(0, BLOCK_C)
    return i_tile, o_row, o_c, (o_row < rows)[:, None] & (o_c < channels)[None, :]


@triton.jit
def sum_of_taps(
    x, state, taps, where, o_row, o_c, m_tile, cu_seqlens, channels, WIDTH: tl.constexpr
):
    # bias + sum_j weight_j x_(t - W + 1 + j)
    b_sum = load_bias(taps, o_c, o_c < channels, o_row.shape[0], o_c.shape[0])
    for j in tl.static_range(WIDTH):
        b_x = load_input(x, state, where, o_row, o_c, m_tile, WIDTH - 1 - j, cu_seqlens, WIDTH)
        b_sum = tl.fma(
            tl.broadcast_to(load_tap(taps, j, o_c, o_c < channels), b_x.shape), b_x, b_sum
        )
    return b_sum


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    x, out, state, taps, cu_seqlens, rows, seqlen, sequences, halvings, slices, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, o_row, o_c, m_tile = tile_of(rows, channels, slices, BLOCK_T, BLOCK_C)
    where = place(tl.minimum(o_row, rows - 1), cu_seqlens, rows, seqlen, sequences, halvings)
    b_y = sum_of_taps(x, state, taps, where, o_row, o_c, m_tile, cu_seqlens, channels, WIDTH)
    if SILU:
        b_y *= sigmoid(b_y)
    store_rows(out, where, o_row, o_c, m_tile, cu_seqlens, b_y)


@triton.jit(do_not_specialize=LENGTHS)
def final_kernel(
    x, state, final, cu_seqlens, rows, seqlen, slices, channels,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The last WIDTH - 1 inputs of a sequence."""
    i_b = (tl.program_id(0) // slices).to(tl.int64)
    o_c = (tl.program_id(0) % slices) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    start, length = bounds(cu_seqlens, i_b, rows, seqlen)
    o_first = i_b * x.batch
    if cu_seqlens is not None:
        o_first = start.to(tl.int64) * x.seq
    for k in tl.static_range(WIDTH - 1):
        position = length - (WIDTH - 1) + k + tl.zeros([BLOCK_C], tl.int32)
        p_x = x.data + o_first + position.to(tl.int64) * x.seq + o_c
        b_x = tl.load(p_x, mask=m_c & (position >= 0), other=0.0)
        if state is not None:
            o_state = i_b * state.sequence + (WIDTH - 1 + position).to(tl.int64) * state.column
            p_state = state.data + o_state + o_c.to(tl.int64) * state.channel
            b_x = tl.where(
                position >= 0, b_x, tl.load(p_state, mask=m_c & (position < 0), other=0.0)
            )
        o_final = i_b * final.sequence + o_c.to(tl.int64) * final.channel + k * final.column
        tl.store(final.data + o_final, b_x, mask=m_c)


@triton.jit
def bounds(cu_seqlens, i_b, rows, seqlen):
    """First row and length of a sequence, clamped to the tensor."""
    if cu_seqlens is None:
        start = (i_b * seqlen).to(tl.int32)
        length = seqlen + tl.zeros_like(start)
    else:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_b), 0), rows)
        end = tl.minimum(tl.load(cu_seqlens + i_b + 1), rows)
        length = tl.maximum(end, start) - start
    return start, length


@triton.jit(do_not_specialize=LENGTHS)
def filter_kernel(
    x, dout, dpre, state, taps, parts, cu_seqlens, rows, seqlen, sequences, halvings, slices,
    channels, WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients before the activation, and their sums with the inputs of each tap."""
    i_tile, o_row, o_c, m_tile = tile_of(rows, channels, slices, BLOCK_T, BLOCK_C)
    where = place(tl.minimum(o_row, rows - 1), cu_seqlens, rows, seqlen, sequences, halvings)
    b_d = load_rows(dout, where, o_row, o_c, m_tile, cu_seqlens)
    if SILU:
        b_y = sum_of_taps(x, state, taps, where, o_row, o_c, m_tile, cu_seqlens, channels, WIDTH)
        b_s = sigmoid(b_y)
        b_d *= b_s * (1.0 + b_y * (1.0 - b_s))
    # Rows of the tile beyond the end have no gradient, whatever the filter.
    b_d = tl.where(m_tile, b_d, 0.0)
    o_dpre = o_row.to(tl.int64)[:, None] * channels + o_c[None, :]
    tl.store(dpre + o_dpre, b_d, mask=m_tile)
    p_part = parts + tl.cast(i_tile, tl.int64) * (WIDTH + 1) * channels + o_c
    for j in tl.static_range(WIDTH):
        b_x = load_input(x, state, where, o_row, o_c, m_tile, WIDTH - 1 - j, cu_seqlens, WIDTH)
        tl.store(p_part + j * channels, tl.sum(b_d * b_x, 0), mask=o_c < channels)
    tl.store(p_part + WIDTH * channels, tl.sum(b_d, 0), mask=o_c < channels)


@triton.jit(do_not_specialize=LENGTHS)
def input_kernel(
    dpre, dx, dfinal, taps, cu_seqlens, rows, seqlen, sequences, halvings, slices, channels,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, o_row, o_c, m_tile = tile_of(rows, channels, slices, BLOCK_T, BLOCK_C)
    where = place(tl.minimum(o_row, rows - 1), cu_seqlens, rows, seqlen, sequences, halvings)
    left = where.length - where.position
    b_dx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in tl.static_range(WIDTH):
        # dx_t += weight_(W - 1 - k) dpre_(t + k)
        m_k = m_tile & (left > k)[:, None]
        p_dpre = dpre + (o_row + k).to(tl.int64)[:, None] * channels + o_c[None, :]
        b_w = load_tap(taps, WIDTH - 1 - k, o_c, o_c < channels)
        b_dx += tl.where(m_k, b_w * tl.load(p_dpre, mask=m_k, other=0.0), 0.0)
    if dfinal is not None:
        m_last = m_tile & (left < WIDTH)[:, None]
        o_final = where.b.to(tl.int64) * dfinal.sequence
        o_final += (WIDTH - 1 - left).to(tl.int64) * dfinal.column
        p_final = dfinal.data + o_final[:, None] + (o_c.to(tl.int64) * dfinal.channel)[None, :]
        b_dx += tl.load(p_final, mask=m_last, other=0.0).to(tl.float32)
    store_rows(dx, where, o_row, o_c, m_tile, cu_seqlens, b_dx)


@triton.jit(do_not_specialize=LENGTHS)
def initial_kernel(
    dpre, dinitial, dfinal, taps, cu_seqlens, rows, seqlen, slices, channels,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dinitial_state of a sequence: input k meets tap k - t of token t."""
    i_b = (tl.program_id(0) // slices).to(tl.int64)
    o_c = (tl.program_id(0) % slices) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    start, length = bounds(cu_seqlens, i_b, rows, seqlen)
    p_dpre = dpre + start.to(tl.int64) * channels + o_c
    for k in tl.static_range(WIDTH - 1):
        b_sum = tl.zeros([BLOCK_C], tl.float32)
        for t in tl.static_range(k + 1):
            m_t = m_c & (length + tl.zeros([BLOCK_C], tl.int32) > t)
            p_tap = taps.weight + o_c.to(tl.int64) * taps.channel + (k - t) * taps.tap
            b_w = tl.load(p_tap, mask=m_t, other=0.0).to(tl.float32)
            b_d = tl.load(p_dpre + tl.cast(channels, tl.int64) * t, mask=m_t, other=0.0)
            b_sum += b_w * b_d
        if dfinal is not None:
            o_k = k - length + tl.zeros([BLOCK_C], tl.int32)
            o_final = i_b * dfinal.sequence + o_k.to(tl.int64) * dfinal.column
            p_final = dfinal.data + o_final + o_c.to(tl.int64) * dfinal.channel
            b_sum += tl.load(p_final, mask=m_c & (o_k >= 0), other=0.0).to(tl.float32)
        o_initial = i_b * dinitial.sequence + o_c.to(tl.int64) * dinitial.channel
        p_initial = dinitial.data + o_initial + k * dinitial.column
        tl.store(p_initial, rounded(b_sum, dinitial.data.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["tokens", "slots", "slices", "channels", "columns"])
def decode_kernel(
    x, out, state, taps, requests, tokens, slots, slices, channels, columns,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // slices).to(tl.int64)
    o_c = (tl.program_id(0) % slices) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    slot, used, kept = load_request(requests, i_b, tokens, slots)
    m_used = m_c & (tl.zeros([BLOCK_C], tl.int64) < tl.where(used, 1, 0))
    p_state = state.data + slot * state.sequence + o_c.to(tl.int64) * state.channel
    p_x = x.data + i_b * x.batch + o_c
    for t in range(tokens):
        b_sum = tl.zeros([BLOCK_C], tl.float32)
        if taps.bias is not None:
            p_bias = taps.bias + o_c.to(tl.int64) * taps.bias_channel
            b_sum += tl.load(p_bias, mask=m_c, other=0.0).to(tl.float32)
        for j in tl.static_range(WIDTH):
            i_x = t - (WIDTH - 1 - j) + tl.zeros([BLOCK_C], tl.int32)
            b_x = tl.load(p_x + i_x.to(tl.int64) * x.seq, mask=m_used & (i_x >= 0), other=0.0)
            p_old = p_state + (columns + i_x).to(tl.int64) * state.column
            b_old = tl.load(p_old, mask=m_used & (i_x < 0), other=0.0)
            b_in = b_x.to(tl.float32) + b_old.to(tl.float32)
            p_tap = taps.weight + o_c.to(tl.int64) * taps.channel + j * taps.tap
            b_w = tl.load(p_tap, mask=m_c, other=0.0).to(tl.float32)
            b_sum = tl.fma(b_w, b_in, b_sum)
        if SILU:
            b_sum *= sigmoid(b_sum)
        b_sum = tl.where(m_used, b_sum, 0.0)
        p_out = out.data + i_b * out.batch + tl.cast(t, tl.int64) * out.seq + o_c
        tl.store(p_out, rounded(b_sum, out.data.dtype.element_ty), mask=m_c)
    # Ascending columns: column k + kept is read before it is written.
    for k in range(columns):
        i_x = k + kept - columns + tl.zeros([BLOCK_C], tl.int64)
        b_x = tl.load(p_x + i_x * x.seq, mask=m_used & (i_x >= 0), other=0.0)
        p_old = p_state + (k + kept) * state.column
        b_old = tl.load(p_old, mask=m_used & (i_x < 0), other=0.0)
        b_new = tl.where(i_x >= 0, b_x, b_old)
        tl.store(p_state + tl.cast(k, tl.int64) * state.column, b_new, mask=m_used)
