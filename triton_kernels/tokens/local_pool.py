"""local_pool: a program pools a slice of channels for a run of tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INF, launch, rounded
from .rows import steps_of, tile_of

STEPS = ["x_batch", "x_line", "dout_batch", "dout_line", "mask_batch", "mask_line"]
SIZES = ["height", "width", "tokens", "blocks", "dilation_y", "dilation_x", *STEPS]
NO_TAP = tl.constexpr(-1)


class Map(NamedTuple):
    """[B, height, width, ...]; strides in elements."""

    data: Any
    batch: Any
    line: Any
    token: Any


@triton.jit
def pointers_of(tokens, o_b, o_y, o_x):
    return tokens.data + o_b * tokens.batch + o_y * tokens.line + o_x * tokens.token


@triton.jit
def counts(mask, o_b, o_y, o_x, m):
    """Mask of tokens that take part in windows, restricted to m."""
    if mask.data is not None:
        m = m & (tl.load(pointers_of(mask, o_b, o_y, o_x), mask=m, other=0) != 0)
    return m


@triton.jit
def shifted(o_y, o_x, step_y, step_x, height, width, m):
    """Line and column of tokens after a step, and mask of those inside of the map."""
    o_ty = o_y + step_y
    o_tx = o_x + step_x
    return o_ty, o_tx, m & (o_ty >= 0) & (o_ty < height) & (o_tx >= 0) & (o_tx < width)


@triton.jit
def tile_of_program(blocks, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Tokens and channels of this program."""
    i = tl.program_id(0)
    o_n = (i // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return o_n, i % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def places_of(o_n, height, width):
    """Map, line and column of tokens."""
    return o_n // width // height, o_n // width % height, o_n % width


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    x, mask, out, x_batch, x_line, x_token, mask_batch, mask_line, mask_token, height, width,
    tokens, blocks, dilation_y, dilation_x, channels,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, MAX: tl.constexpr, TAPS: tl.constexpr,
    PAD: tl.constexpr, SUBTRACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pooled tokens; with TAPS, out takes the tap that each maximum comes from."""
    rows = Map(x, x_batch, x_line, x_token)
    taken = Map(mask, mask_batch, mask_line, mask_token)
    o_n, o_c = tile_of_program(blocks, BLOCK_R, BLOCK_C)
    m_n = o_n < tokens
    m_c = (o_c < channels)[None, :]
    o_b, o_y, o_x = places_of(o_n, height, width)
    b_pooled = tl.full([BLOCK_R, BLOCK_C], -INF if MAX else 0.0, tl.float32)
    b_tap = tl.full([BLOCK_R, BLOCK_C], NO_TAP, tl.int32)
    b_count = tl.zeros([BLOCK_R], tl.int32)
    for i_y in range(KERNEL_Y):
        b_line = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for i_x in range(KERNEL_X):
            step_y = (i_y - KERNEL_Y // 2) * dilation_y
            step_x = (i_x - KERNEL_X // 2) * dilation_x
            o_ty, o_tx, m_tap = shifted(o_y, o_x, step_y, step_x, height, width, m_n)
            m_tap = counts(taken, o_b, o_ty, o_tx, m_tap)
            b_count += m_tap.to(tl.int32)
            p_x = pointers_of(rows, o_b, o_ty, o_tx)
            m_x = m_tap[:, None] & m_c
            b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
            if MAX:
                # A NaN wins over any number, and the first NaN stays.
                m_wins = (b_tap < 0) | ((b_pooled == b_pooled) & ((b_x <= b_pooled) == 0))
                m_wins = m_wins & m_x
                b_pooled = tl.where(m_wins, b_x, b_pooled)
                b_tap = tl.where(m_wins, i_y * KERNEL_X + i_x, b_tap)
            else:
                b_line += b_x
        if not MAX:
            b_pooled += b_line
    p_out = out + o_n[:, None] * channels + o_c[None, :]
    m_out = m_n[:, None] & m_c
    if TAPS:
        tl.store(p_out, b_tap.to(out.dtype.element_ty), mask=m_out)
    else:
        if not MAX:
            b_divisor = tl.maximum(b_count, 1)
            if PAD:
                b_divisor = tl.full([BLOCK_R], KERNEL_Y * KERNEL_X, tl.int32)
            b_pooled = tl.div_rn(b_pooled, b_divisor.to(tl.float32)[:, None])
        b_pooled = tl.where((b_count > 0)[:, None], b_pooled, 0.0)
        if SUBTRACT:
            p_x = pointers_of(rows, o_b, o_y, o_x)
            b_pooled -= tl.load(p_x[:, None] + o_c[None, :], mask=m_out, other=0.0).to(tl.float32)
        tl.store(p_out, rounded(b_pooled, out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=SIZES)
def scales_kernel(
    mask, scales, mask_batch, mask_line, mask_token, height, width, tokens, dilation_y, dilation_x,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, PAD: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """1 / divisor of the mean of each token, 0 for an empty window."""
    taken = Map(mask, mask_batch, mask_line, mask_token)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n = o_n < tokens
    o_b, o_y, o_x = places_of(o_n, height, width)
    b_count = tl.zeros([BLOCK_R], tl.int32)
    for i_y in range(KERNEL_Y):
        for i_x in range(KERNEL_X):
            step_y = (i_y - KERNEL_Y // 2) * dilation_y
            step_x = (i_x - KERNEL_X // 2) * dilation_x
            o_ty, o_tx, m_tap = shifted(o_y, o_x, step_y, step_x, height, width, m_n)
            m_tap = counts(taken, o_b, o_ty, o_tx, m_tap)
            b_count += m_tap.to(tl.int32)
    b_divisor = tl.maximum(b_count, 1)
    if PAD:
        b_divisor = tl.full([BLOCK_R], KERNEL_Y * KERNEL_X, tl.int32)
    b_scale = tl.where(b_count > 0, 1.0 / b_divisor.to(tl.float32), 0.0)
    tl.store(scales + o_n, b_scale, mask=m_n)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dout, mask, scales, taps, dx, dout_batch, dout_line, dout_token, mask_batch, mask_line,
    mask_token, height, width, tokens, blocks, dilation_y, dilation_x, channels,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, SUBTRACT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of a tile. A token is tap t in the window of the token at minus t's offset. Means read
    scales, maxima read taps."""
    douts = Map(dout, dout_batch, dout_line, dout_token)
    taken = Map(mask, mask_batch, mask_line, mask_token)
    o_n, o_c = tile_of_program(blocks, BLOCK_R, BLOCK_C)
    m_n = o_n < tokens
    m_c = (o_c < channels)[None, :]
    o_b, o_y, o_x = places_of(o_n, height, width)
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_y in range(KERNEL_Y):
        b_line = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for i_x in range(KERNEL_X):
            step_y = (KERNEL_Y // 2 - i_y) * dilation_y
            step_x = (KERNEL_X // 2 - i_x) * dilation_x
            o_ty, o_tx, m_tap = shifted(o_y, o_x, step_y, step_x, height, width, m_n)
            o_t = (o_b * height + o_ty) * width + o_tx
            m_tile = m_tap[:, None] & m_c
            if taps is not None:
                p_taps = taps + o_t[:, None] * channels + o_c[None, :]
                b_tap = tl.load(p_taps, mask=m_tile, other=NO_TAP)
                m_tile = m_tile & (b_tap == i_y * KERNEL_X + i_x)
                b_scale = tl.full([BLOCK_R], 1.0, tl.float32)
            else:
                b_scale = tl.load(scales + o_t, mask=m_tap, other=0.0)
                m_tile = m_tile & (b_scale != 0.0)[:, None]
            p_dout = pointers_of(douts, o_b, o_ty, o_tx)
            b_dout = tl.load(p_dout[:, None] + o_c[None, :], mask=m_tile, other=0.0)
            b_line += b_scale[:, None] * b_dout.to(tl.float32)
        b_sum += b_line
    m_in = counts(taken, o_b, o_y, o_x, m_n)
    b_sum = tl.where(m_in[:, None], b_sum, 0.0)
    m_out = m_n[:, None] & m_c
    if SUBTRACT:
        p_dout = pointers_of(douts, o_b, o_y, o_x)
        b_sum -= tl.load(p_dout[:, None] + o_c[None, :], mask=m_out, other=0.0).to(tl.float32)
    p_dx = dx + o_n[:, None] * channels + o_c[None, :]
    tl.store(p_dx, rounded(b_sum, dx.dtype.element_ty), mask=m_out)


def _mask_steps(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if mask is None else steps_of(mask, 3)


def _pool(a: Any, out: Tensor, *, taps: bool = False) -> None:
    """Pools x into out; with taps, out takes the tap that each maximum comes from."""
    *lead, channels = a.x.shape
    tokens = math.prod(lead)
    tile = tile_of(channels, computed=True)
    blocks = triton.cdiv(channels, tile["BLOCK_C"])
    launch(
        pool_kernel, triton.cdiv(tokens, tile["BLOCK_R"]) * blocks, a.x, a.x, a.mask, out,
        *steps_of(a.x, 3), *_mask_steps(a.mask), *lead[1:], tokens, blocks, a.dilation_y,
        a.dilation_x, channels, KERNEL_Y=a.kernel_y, KERNEL_X=a.kernel_x, MAX=a.pooling == "max",
        TAPS=taps, PAD=a.count_include_pad and not taps, SUBTRACT=a.subtract_input and not taps,
        **tile,
    )  # fmt: skip


def local_pool(a: Any) -> Tensor:
    out = a.x.new_empty(a.x.shape)
    _pool(a, out)
    return out


def local_pool_backward(a: Any) -> Tensor:
    *lead, channels = a.x.shape
    tokens = math.prod(lead)
    dx = a.x.new_empty(a.x.shape)
    taps = scales = None
    if a.pooling == "max":
        taps = a.x.new_empty(a.x.shape, dtype=torch.int32)
        _pool(a, taps, taps=True)
    else:
        scales = a.x.new_empty(lead, dtype=torch.float32)
        launch(
            scales_kernel, triton.cdiv(tokens, 1024), a.x, a.mask, scales, *_mask_steps(a.mask),
            *lead[1:], tokens, a.dilation_y, a.dilation_x, KERNEL_Y=a.kernel_y,
            KERNEL_X=a.kernel_x, PAD=a.count_include_pad, BLOCK_R=1024,
        )  # fmt: skip
    tile = tile_of(channels, computed=True)
    blocks = triton.cdiv(channels, tile["BLOCK_C"])
    launch(
        backward_kernel, triton.cdiv(tokens, tile["BLOCK_R"]) * blocks, a.x, a.dout, a.mask, scales,
        taps, dx, *steps_of(a.dout, 3), *_mask_steps(a.mask), *lead[1:], tokens, blocks,
        a.dilation_y, a.dilation_x, channels, KERNEL_Y=a.kernel_y, KERNEL_X=a.kernel_x,
        SUBTRACT=a.subtract_input, **tile,
    )  # fmt: skip
    return dx
