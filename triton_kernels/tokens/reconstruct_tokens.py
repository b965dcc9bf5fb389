"""reconstruct_tokens: weighted means after the nearest-centroid search, and the gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import FLOAT_MAX, INTERPRETED, LOG2E, Rows, launch, rounded
from ..sparse.transpose_block_list import compacted, transposed
from .nearest import MapRows, find_nearest

SIZES = ["tokens", "tiles", "channels", "clusters", "k", "lists"]


@triton.jit(do_not_specialize=SIZES)
def mean_kernel(
    index, distances, minimum, weight, values, out, factor, tokens, tiles, channels, k,
    UNIT_NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """weights = exp2((min - d) factor) / norm, out = weights V."""
    i = tl.program_id(0)
    i_b = (i // tiles).to(tl.int64)
    o_r = i % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < tokens
    o_row = i_b * tokens + o_r
    b_min = tl.load(minimum + o_row, mask=m_r, other=0.0)
    b_total = tl.zeros([BLOCK_R], tl.float32)
    for j in range(k):
        b_d = tl.load(distances + o_row * k + j, mask=m_r, other=0.0)
        b_w = tl.exp2((b_min - b_d) * factor)
        b_w = tl.where(b_min < FLOAT_MAX, b_w, float("nan"))
        if UNIT_NORM:
            b_w = b_w * b_w
        b_total += b_w
    if UNIT_NORM:
        b_total = tl.sqrt(b_total)
    for j in range(k):
        b_d = tl.load(distances + o_row * k + j, mask=m_r, other=0.0)
        b_w = tl.exp2((b_min - b_d) * factor) / b_total
        tl.store(weight + o_row * k + j, b_w, mask=m_r)
    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = m_r[:, None] & (o_c < channels)[None, :]
        b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for j in range(k):
            b_d = tl.load(distances + o_row * k + j, mask=m_r, other=0.0)
            b_w = tl.exp2((b_min - b_d) * factor) / b_total
            b_m = tl.load(index + o_row * k + j, mask=m_r, other=0).to(tl.int64)
            p_z = values.data + i_b * values.batch + b_m * values.seq
            b_z = tl.load(p_z[:, None] + o_c[None, :], mask=m_c, other=0.0).to(tl.float32)
            b_sum += b_w[:, None] * b_z
        p_out = out + (o_row * channels)[:, None] + o_c[None, :]
        tl.store(p_out, rounded(b_sum, out.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    offsets, listed, index, weight, dout, dvalues, tokens, clusters, channels, k, lists,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dvalues; one program per centroid sums over the tokens that list it, in order."""
    i = tl.program_id(0)
    i_m = i % clusters
    i_b = (i // clusters).to(tl.int64)
    p_offset = offsets + i_b * (clusters + 1) + i_m
    begin = tl.load(p_offset)
    end = tl.load(p_offset + 1)
    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = (o_c < channels)[None, :]
        b_sum = tl.zeros([BLOCK_C], tl.float32)
        for t in range(begin, end, BLOCK_T):
            o_t = t + tl.arange(0, BLOCK_T)
            m_t = o_t < end
            o_n = tl.load(listed + i_b * lists + o_t, mask=m_t, other=0).to(tl.int64)
            b_w = tl.zeros([BLOCK_T], tl.float32)
            for j in range(k):
                o_at = (i_b * tokens + o_n) * k + j
                m_own = m_t & (tl.load(index + o_at, mask=m_t, other=-1) == i_m)
                b_w += tl.load(weight + o_at, mask=m_own, other=0.0)
            p_d = dout.data + i_b * dout.batch + o_n * dout.seq
            b_d = tl.load(p_d[:, None] + o_c[None, :], mask=m_t[:, None] & m_c, other=0.0)
            # dV_m += w_nm dout_n
            b_sum += tl.sum(b_w[:, None] * b_d.to(tl.float32), 0)
        p_out = dvalues + (i_b * clusters + i_m) * channels + o_c
        tl.store(p_out, rounded(b_sum, dvalues.dtype.element_ty), mask=o_c < channels)


def channel_block(channels: int) -> int:
    maximum = 1024 if INTERPRETED.value else 128
    return max(min(triton.next_power_of_2(channels), maximum), 16)


def reconstruct_tokens(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    features, centroids, values, k = a.features, a.centroids, a.values, a.k
    batch, tokens, channels = features.shape
    clusters, value_channels = values.shape[1:]
    rows = MapRows(features, features.stride(0), 0, features.stride(1))
    others = MapRows(centroids, centroids.stride(0), 0, centroids.stride(1))
    near = find_nearest(rows, others, (batch, tokens, max(tokens, 1), clusters), channels, k)
    weight = values.new_empty((batch, tokens, k), dtype=torch.float32)
    out = values.new_empty((batch, tokens, value_channels))
    block = 64 if INTERPRETED.value else 16
    tiles = triton.cdiv(tokens, block)
    where = Rows(values, values.stride(0), values.stride(1), 0)
    block_c = channel_block(value_channels)
    launch(mean_kernel, batch * tiles, values, *near, weight, where, out, a.tau * LOG2E.value,
           tokens, tiles, value_channels, k, a.norm == "l2", block, block_c)  # fmt: skip
    return out, near.ids, weight


def reconstruct_tokens_backward(a: Any) -> Tensor:
    index, dout, k = a.index, a.dout, a.k
    batch, clusters, channels = a.values.shape
    tokens = index.shape[1]
    counts = index.new_full((batch, 1, tokens), k)
    offsets, listed, _ = transposed(compacted(index[:, None], counts, clusters))
    dvalues = a.values.new_empty(a.values.shape)
    launch(gradient_kernel, batch * clusters, a.values, offsets, listed, index.contiguous(),
           a.weight.contiguous(), Rows(dout, dout.stride(0), dout.stride(1), 0), dvalues, tokens,
           clusters, channels, k, tokens * k, 16, channel_block(channels))  # fmt: skip
    return dvalues
