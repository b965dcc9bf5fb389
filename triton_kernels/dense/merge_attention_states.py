"""merge_attention_states: out = sum of w_i outs_i with w_i = e^lse_i / sum of e^lse_j, row by row.

A row is one head of one token. Backward, with delta_i = dout.outs_i and delta = sum of w_i delta_i:
douts_i = w_i dout, dlses_i = w_i (delta_i - delta + dlse).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INF, launch, load_tile, store_tile

ELEMENTS = 4096  # elements of one part per program
SIZES = ["parts", "seqlen", "heads", "rows"]


class Parts(NamedTuple):
    """[n, B, S, H, D] with a contiguous last dimension, or [n, B, H, S]; strides in elements."""

    data: Tensor
    part: int
    batch: int
    seq: int
    head: int


@triton.jit
def pointers_of(x, i, o_row, seqlen, heads):
    """Pointers to rows of part i. Row numbers run over [B, S, H]."""
    o_token = o_row // heads
    o_x = o_token // seqlen * x.batch + o_token % seqlen * x.seq + o_row % heads * x.head
    return x.data + tl.cast(i, tl.int64) * x.part + o_x


@triton.jit
def scale_of(lses, parts, o_row, m_row, seqlen, heads):
    """(row_max, sum) with w_i = e^(lse_i - row_max) / sum. Weights do not come from log sum: once
    rounded, it is too coarse."""
    b_top = tl.full(o_row.shape, -INF, tl.float32)
    for i in range(parts):
        p_lse = pointers_of(lses, i, o_row, seqlen, heads)
        b_top = tl.maximum(b_top, tl.load(p_lse, mask=m_row, other=0.0))
    b_max = tl.where(b_top == -INF, 0.0, b_top)
    b_sum = tl.zeros(o_row.shape, tl.float32)
    for i in range(parts):
        p_lse = pointers_of(lses, i, o_row, seqlen, heads)
        b_sum += tl.exp(tl.load(p_lse, mask=m_row, other=0.0) - b_max)
    return b_max, b_sum


@triton.jit
def weight(lses, i, b_max, b_sum, o_row, m_row, seqlen, heads):
    """w_i; an empty part has weight 0."""
    b_w = tl.full(o_row.shape, 1.0, tl.float32)
    if lses is not None:
        p_lse = pointers_of(lses, i, o_row, seqlen, heads)
        b_x = tl.load(p_lse, mask=m_row, other=-INF)
        b_w = tl.where(b_x == -INF, 0.0, tl.exp(b_x - b_max) / b_sum)
    return b_w


@triton.jit
def merged(
    outs,
    lses,
    b_max,
    b_sum,
    parts,
    o_row,
    m_row,
    seqlen,
    heads,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum of w_i outs_i. Parts of weight 0 are not loaded, so their contents do not matter."""
    b_merged = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i in range(parts):
        b_w = weight(lses, i, b_max, b_sum, o_row, m_row, seqlen, heads)
        p_out = pointers_of(outs, i, o_row, seqlen, heads)
        b_out = load_tile(p_out, m_row & (b_w != 0.0), DIM, BLOCK_D)
        b_merged += b_w[:, None] * b_out.to(tl.float32)
    return b_merged


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    outs,
    lses,
    out,
    lse,
    parts,
    seqlen,
    heads,
    rows,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < rows
    b_max = tl.zeros([BLOCK_R], tl.float32)
    b_sum = tl.full([BLOCK_R], 1.0, tl.float32)
    if lses is not None:
        b_max, b_sum = scale_of(lses, parts, o_row, m_row, seqlen, heads)
        b_lse = b_max + tl.log(b_sum)
        tl.store(pointers_of(lse, 0, o_row, seqlen, heads), b_lse, mask=m_row)
    b_out = merged(
        outs, lses, b_max, b_sum, parts, o_row, m_row, seqlen, heads, DIM, BLOCK_R, BLOCK_D
    )
    store_tile(pointers_of(out, 0, o_row, seqlen, heads), m_row, b_out, DIM)


@triton.jit(do_not_specialize=SIZES)
def merge_backward_kernel(
    dout,
    dlse,
    outs,
    lses,
    douts,
    dlses,
    parts,
    seqlen,
    heads,
    rows,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < rows
    b_dout = load_tile(pointers_of(dout, 0, o_row, seqlen, heads), m_row, DIM, BLOCK_D)
    b_dout = b_dout.to(tl.float32)
    b_max = tl.zeros([BLOCK_R], tl.float32)
    b_sum = tl.full([BLOCK_R], 1.0, tl.float32)
    b_delta = tl.zeros([BLOCK_R], tl.float32)
    if lses is not None:
        b_max, b_sum = scale_of(lses, parts, o_row, m_row, seqlen, heads)
        b_out = merged(
            outs, lses, b_max, b_sum, parts, o_row, m_row, seqlen, heads, DIM, BLOCK_R, BLOCK_D
        )
        # delta = sum of w_i delta_i - dlse
        b_delta = tl.sum(b_dout * b_out, 1)
        if dlse is not None:
            b_delta -= tl.load(pointers_of(dlse, 0, o_row, seqlen, heads), mask=m_row, other=0.0)
    for i in range(parts):
        b_w = weight(lses, i, b_max, b_sum, o_row, m_row, seqlen, heads)
        m_used = b_w != 0.0
        # douts_i = w_i dout
        b_dx = tl.where(m_used[:, None], b_w[:, None] * b_dout, 0.0)
        store_tile(pointers_of(douts, i, o_row, seqlen, heads), m_row, b_dx, DIM)
        if lses is not None:
            p_out = pointers_of(outs, i, o_row, seqlen, heads)
            # dlses_i = w_i (delta_i - delta + dlse)
            b_out = load_tile(p_out, m_row & m_used, DIM, BLOCK_D).to(tl.float32)
            b_dlse = tl.where(m_used, b_w * (tl.sum(b_dout * b_out, 1) - b_delta), 0.0)
            tl.store(pointers_of(dlses, i, o_row, seqlen, heads), b_dlse, mask=m_row)


def rows_of(x: Tensor, packed: bool) -> Parts:
    x = x.unsqueeze(1) if packed else x
    return Parts(x, *x.stride()[:4])


def statistics_of(x: Tensor | None, packed: bool) -> Parts | None:
    return None if x is None else rows_of(x.transpose(-1, -2), packed)


def launch_rows(kernel: Any, outs: Tensor, *args: Any) -> None:
    """One program for as many rows as fit in ELEMENTS."""
    parts, *rows, heads, dim = outs.shape
    block_d = triton.next_power_of_2(max(dim, 1))
    block_r = max(1, ELEMENTS // block_d)
    launch(
        kernel,
        triton.cdiv(math.prod(rows) * heads, block_r),
        outs,
        *args,
        parts,
        rows[-1],
        heads,
        math.prod(rows) * heads,
        DIM=dim,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
    )


def merge_attention_states(a: Any) -> tuple[Tensor, Tensor]:
    packed = a.outs.dim() == 4
    out = a.outs.new_empty(a.outs.shape[1:])
    lse = None if a.lses is None else a.outs.new_empty(a.lses.shape[1:], dtype=torch.float32)
    launch_rows(
        merge_kernel,
        a.outs,
        rows_of(a.outs, packed),
        statistics_of(a.lses, packed),
        rows_of(out[None], packed),
        statistics_of(None if lse is None else lse[None], packed),
    )
    return out, a.outs.new_empty(0, dtype=torch.float32) if lse is None else lse


def merge_attention_states_backward(a: Any) -> tuple[Tensor, Tensor]:
    packed = a.outs.dim() == 4
    douts = a.outs.new_empty(a.outs.shape)
    dlses = None if a.lses is None else a.outs.new_empty(a.lses.shape, dtype=torch.float32)
    launch_rows(
        merge_backward_kernel,
        a.outs,
        rows_of(a.dout[None], packed),
        statistics_of(None if a.dlse is None else a.dlse[None], packed),
        rows_of(a.outs, packed),
        statistics_of(a.lses, packed),
        rows_of(douts, packed),
        statistics_of(dlses, packed),
    )
    return douts, a.outs.new_empty(0, dtype=torch.float32) if dlses is None else dlses
