"""gather_fuse: kept rows are copied, and the rest is summed one tile of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch, rounded
from .rows import bits_of, copy_rows, places_kernel, steps_of, tile_of

BATCHES = ["x_batch", "keep_batch", "rest_batch", "weight_batch", "dout_batch", "out_batch"]
SIZES = ["prefix", "patches", "kept", "rest", "blocks", *BATCHES]
ENTRIES = 1024  # entries per program
SLICE = 128  # channels of f per program
ROWS = 32  # rows of rest per step


@triton.jit(do_not_specialize=SIZES)
def copy_kernel(
    x, keep_ids, out, x_batch, x_token, keep_batch, prefix, patches, kept, blocks, channels,
    out_batch, out_row,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_b = (i // blocks).to(tl.int64)
    o_row = (i % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < prefix + kept
    m_kept = m_row & (o_row >= prefix)
    b_id = tl.load(keep_ids + i_b * keep_batch + o_row - prefix, mask=m_kept, other=0).to(tl.int64)
    m_from = m_row & ((o_row < prefix) | ((b_id >= 0) & (b_id < patches)))
    b_token = tl.where(m_kept, prefix + b_id, o_row)
    p_from = x + i_b * x_batch + b_token * x_token
    p_to = out + i_b * out_batch + o_row * out_row
    copy_rows(p_to, p_from, m_row, m_from, channels, BLOCK_C)


@triton.jit(do_not_specialize=SIZES)
def fuse_kernel(
    x, rest_ids, weight, out, weight_sum, x_batch, x_token, rest_batch, weight_batch, prefix,
    patches, kept, rest, blocks, channels, out_batch, out_row,
    NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_b = (i // blocks).to(tl.int64)
    o_c = i % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_f = tl.zeros([BLOCK_C], tl.float32)
    b_total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, rest, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        b_id = tl.load(rest_ids + i_b * rest_batch + o_r, mask=o_r < rest, other=-1).to(tl.int64)
        m_id = (b_id >= 0) & (b_id < patches)
        b_w = tl.load(weight + i_b * weight_batch + b_id, mask=m_id, other=0.0)
        p_x = x + i_b * x_batch + (prefix + b_id) * x_token
        b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_id[:, None] & m_c[None, :], other=0.0)
        # A weight may be infinite: masked rows must add 0, not NaN.
        b_x = tl.where(m_id[:, None], b_w[:, None] * b_x.to(tl.float32), 0.0)
        # f += sum of w_i x_i
        b_f += tl.sum(b_x, 0)
        b_total += b_w
    total = tl.sum(b_total, 0)
    if NORMALIZE:
        b_f = tl.where(total == 0.0, 0.0, b_f / tl.where(total == 0.0, 1.0, total))
    p_out = out + i_b * out_batch + (prefix + kept).to(tl.int64) * out_row
    tl.store(p_out + o_c, rounded(b_f, out.dtype.element_ty), mask=m_c)
    tl.store(weight_sum + i_b, total, mask=i % blocks == 0)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dout, out, weight_sum, x, weight, places, dx, dweight, dout_batch, dout_row, out_batch, out_row,
    x_batch, x_token, weight_batch, prefix, patches, kept, blocks, channels,
    NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_b = (i // blocks).to(tl.int64)
    o_n = (i % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n = o_n < prefix + patches
    m_patch = m_n & (o_n >= prefix)
    o_j = i_b * patches + o_n - prefix
    b_place = tl.load(places + o_j, mask=m_patch, other=-1).to(tl.int64)
    m_rest = b_place >= kept
    m_copied = m_n & ((o_n < prefix) | ((b_place >= 0) & (b_place < kept)))
    b_row = tl.where(m_patch, prefix + b_place, o_n)
    p_dout = dout + i_b * dout_batch + b_row * dout_row
    p_df = dout + i_b * dout_batch + (prefix + kept) * dout_row
    p_f = out + i_b * out_batch + (prefix + kept) * out_row
    p_x = x + i_b * x_batch + o_n * x_token
    p_dx = dx + (i_b * (prefix + patches) + o_n) * channels
    p_w = weight + i_b * weight_batch + o_n - prefix
    b_w = tl.load(p_w, mask=m_rest, other=0.0)
    b_divisor = tl.full([BLOCK_R], 1.0, tl.float32)
    if NORMALIZE:
        b_total = tl.load(weight_sum + i_b + tl.zeros([BLOCK_R], tl.int32))
        m_rest = m_rest & (b_total != 0.0)
        b_divisor = tl.where(b_total != 0.0, b_total, 1.0)
        b_w = b_w / b_divisor
    b_dw = tl.zeros([BLOCK_R], tl.float32)
    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        m_tile = m_rest[:, None] & m_c[None, :]
        b_df = tl.load(p_df + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_tile, other=0.0).to(tl.float32)
        if NORMALIZE:
            b_x -= tl.load(p_f + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        # dw_i = (x_i - f) . df / total, dx_i = w_i / total df (NORMALIZE)
        b_dw += tl.sum(tl.where(m_tile, b_x * b_df[None, :], 0.0), 1)
        m_copy = m_copied[:, None] & m_c[None, :]
        b_copy = tl.load(p_dout[:, None] + o_c[None, :], mask=m_copy, other=0.0)
        b_scaled = rounded(b_w[:, None] * b_df[None, :], dx.dtype.element_ty)
        b_dx = tl.where(m_rest[:, None], b_scaled, b_copy)
        tl.store(p_dx[:, None] + o_c[None, :], b_dx, mask=m_n[:, None] & m_c[None, :])
    tl.store(dweight + o_j, tl.where(m_rest, b_dw / b_divisor, 0.0), mask=m_patch)


def gather_fuse(a: Any) -> tuple[Tensor, Tensor]:
    out = a.x.new_empty((a.x.shape[0], a.prefix + a.keep.shape[1] + 1, a.x.shape[2]))
    return out, _fuse(a, out)


def gather_fuse_out(a: Any) -> Tensor:
    return _fuse(a, a.out)


def _fuse(a: Any, out: Tensor) -> Tensor:
    """Writes out, and returns the sums of weights [B]."""
    x, prefix = a.x, a.prefix
    batch, tokens, channels = x.shape
    kept, patches = a.keep.shape[1], tokens - prefix
    weight_sum = x.new_empty((batch,), dtype=torch.float32)
    tile = tile_of(channels)
    blocks = triton.cdiv(prefix + kept, tile["BLOCK_R"])
    launch(
        copy_kernel, batch * blocks if channels else 0, x, bits_of(x), a.keep, bits_of(out),
        *steps_of(x, 2), a.keep.stride(0), prefix, patches, kept, blocks, channels,
        *steps_of(out, 2), **tile,
    )  # fmt: skip
    blocks = max(triton.cdiv(channels, SLICE), 1)
    launch(
        fuse_kernel, batch * blocks, x, x, a.rest, a.weight, out, weight_sum, *steps_of(x, 2),
        a.rest.stride(0), a.weight.stride(0), prefix, patches, kept, a.rest.shape[1], blocks,
        channels, *steps_of(out, 2), NORMALIZE=a.normalize, BLOCK_R=ROWS, BLOCK_C=SLICE,
    )  # fmt: skip
    return weight_sum


def gather_fuse_backward(a: Any) -> tuple[Tensor, Tensor]:
    x = a.x
    batch, tokens, channels = x.shape
    kept, patches = a.keep.shape[1], tokens - a.prefix
    dx = x.new_empty(x.shape)
    dweight = x.new_empty(a.weight.shape, dtype=torch.float32)
    places = torch.full((batch, patches), -1, dtype=torch.int32, device=x.device)
    for ids, first in ((a.keep, 0), (a.rest, kept)):
        blocks = triton.cdiv(ids.shape[1], ENTRIES)
        launch(
            places_kernel, batch * blocks if patches else 0, x, ids, places, ids.stride(0),
            ids.shape[1], patches, first, blocks, BLOCK=ENTRIES,
        )  # fmt: skip
    tile = tile_of(channels, computed=True)
    blocks = triton.cdiv(tokens, tile["BLOCK_R"])
    launch(
        backward_kernel, batch * blocks, x, a.dout, a.out, a.weight_sum, x, a.weight, places, dx,
        dweight, *steps_of(a.dout, 2), *steps_of(a.out, 2), *steps_of(x, 2), a.weight.stride(0),
        a.prefix, patches, kept, blocks, channels, NORMALIZE=a.normalize, **tile,
    )  # fmt: skip
    return dx, dweight
