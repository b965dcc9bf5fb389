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


class Rows(NamedTuple):
    """Rows of a program. Their numbers run over [B, S, H]."""

    number: Any
    inside: Any  # mask
    seqlen: Any
    heads: Any


class Scale(NamedTuple):
    """w_i = e^(lse_i - top) / sum. Weights do not come from log sum: once rounded, it is too
    coarse."""

    top: Any  # row_max
    sum: Any


@triton.jit
def rows_in(seqlen, heads, rows, BLOCK_R: tl.constexpr):
    """Rows of this program."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return Rows(o_row, o_row < rows, seqlen, heads)


@triton.jit
def pointers_of(x, i, rows):
    """Pointers to rows of part i."""
    o_token = rows.number // rows.heads
    o_x = o_token // rows.seqlen * x.batch + o_token % rows.seqlen * x.seq
    return x.data + tl.cast(i, tl.int64) * x.part + (o_x + rows.number % rows.heads * x.head)


@triton.jit
def load_statistics(x, i, rows, other):
    return tl.load(pointers_of(x, i, rows), mask=rows.inside, other=other)


@triton.jit
def scale_of(lses, parts, rows):
    b_top = tl.full(rows.number.shape, -INF, tl.float32)
    for i in range(parts):
        b_top = tl.maximum(b_top, load_statistics(lses, i, rows, 0.0))
    b_max = tl.where(b_top == -INF, 0.0, b_top)
    b_sum = tl.zeros(rows.number.shape, tl.float32)
    for i in range(parts):
        b_sum += tl.exp(load_statistics(lses, i, rows, 0.0) - b_max)
    return Scale(b_max, b_sum)


@triton.jit
def weight(lses, i, scale, rows):
    """w_i; an empty part has weight 0. Without lses, w_i = 1."""
    b_w = tl.full(rows.number.shape, 1.0, tl.float32)
    if lses is not None:
        b_x = load_statistics(lses, i, rows, -INF)
        b_w = tl.where(b_x == -INF, 0.0, tl.exp(b_x - scale.top) / scale.sum)
    return b_w


@triton.jit
def merged(outs, lses, scale, parts, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """sum of w_i outs_i. Parts of weight 0 are not loaded, so their contents do not matter."""
    b_merged = tl.zeros([rows.number.shape[0], BLOCK_D], tl.float32)
    for i in range(parts):
        b_w = weight(lses, i, scale, rows)
        p_out = pointers_of(outs, i, rows)
        b_out = load_tile(p_out, rows.inside & (b_w != 0.0), DIM, BLOCK_D)
        b_merged += b_w[:, None] * b_out.to(tl.float32)
    return b_merged


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    outs, lses, out, lse, parts, seqlen, heads, rows,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = rows_in(seqlen, heads, rows, BLOCK_R)
    scale = None
    if lses is not None:
        scale = scale_of(lses, parts, block)
        b_lse = scale.top + tl.log(scale.sum)
        tl.store(pointers_of(lse, 0, block), b_lse, mask=block.inside)
    b_out = merged(outs, lses, scale, parts, block, DIM, BLOCK_D)
    store_tile(pointers_of(out, 0, block), block.inside, b_out, DIM)


@triton.jit(do_not_specialize=SIZES)
def merge_backward_kernel(
    dout, dlse, outs, lses, douts, dlses, parts, seqlen, heads, rows,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = rows_in(seqlen, heads, rows, BLOCK_R)
    b_dout = load_tile(pointers_of(dout, 0, block), block.inside, DIM, BLOCK_D).to(tl.float32)
    scale = None
    if lses is not None:
        scale = scale_of(lses, parts, block)
        # delta = sum of w_i delta_i - dlse
        b_delta = tl.sum(b_dout * merged(outs, lses, scale, parts, block, DIM, BLOCK_D), 1)
        if dlse is not None:
            b_delta -= load_statistics(dlse, 0, block, 0.0)
    for i in range(parts):
        b_w = weight(lses, i, scale, block)
        m_used = b_w != 0.0
        # douts_i = w_i dout
        b_dx = tl.where(m_used[:, None], b_w[:, None] * b_dout, 0.0)
        store_tile(pointers_of(douts, i, block), block.inside, b_dx, DIM)
        if lses is not None:
            p_out = pointers_of(outs, i, block)
            # dlses_i = w_i (delta_i - delta + dlse)
            b_out = load_tile(p_out, block.inside & m_used, DIM, BLOCK_D).to(tl.float32)
            b_dlse = tl.where(m_used, b_w * (tl.sum(b_dout * b_out, 1) - b_delta), 0.0)
            tl.store(pointers_of(dlses, i, block), b_dlse, mask=block.inside)


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
