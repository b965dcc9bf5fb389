"""segment_reduce: a program owns one segment and a block of channels, and loops over its places.

Backward, a program owns rows of x and gathers the gradient of their segments through a map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INF, launch, rounded

CHANNELS = 256  # max channels per program
ELEMENTS = 4096  # elements per tile
BACKWARD_ELEMENTS = 2048  # larger tiles spill
# Arguments excluded from specialization.
SIZES = ["x_batch", "x_row", "weight_batch", "tokens", "segments", "channels"]
FORWARD_SIZES = [*SIZES, "offsets_batch", "perm_batch", "place_count", "tiles"]
BACKWARD_SIZES = [*SIZES, "dy_batch", "dy_row", "count"]


class Places(NamedTuple):
    """Row lists of segments; strides in elements."""

    offsets: Tensor  # [B, S + 1]
    perm: Tensor | None  # [B, P]
    weight: Tensor | None  # [B, N]


@triton.jit
def rows_of_places(places, i_b, o_p, m_p, perm_batch, tokens):
    """Rows at the given places, and the mask of valid rows."""
    b_row = o_p
    if places.perm is not None:
        b_row = tl.load(places.perm + i_b * perm_batch + o_p, mask=m_p, other=-1)
        m_p = m_p & (b_row >= 0) & (b_row < tokens)
    return b_row.to(tl.int64), m_p


@triton.jit(do_not_specialize=FORWARD_SIZES)
def reduce_kernel(
    x, places, y, weight_sum, arg, x_batch, x_row, offsets_batch, perm_batch, weight_batch, tokens,
    place_count, segments, channels, tiles,
    REDUCE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    EXTREME: tl.constexpr = REDUCE == "amax" or REDUCE == "amin"
    END: tl.constexpr = REDUCE == "first" or REDUCE == "last"
    i = tl.program_id(0)
    i_segment = (i // tiles).to(tl.int64)
    i_b = i_segment // segments
    o_c = i % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    p_end = places.offsets + i_b * offsets_batch + i_segment % segments
    begin = tl.maximum(tl.load(p_end), 0)
    end = tl.minimum(tl.load(p_end + 1), place_count)

    b_y = tl.zeros([BLOCK_C], tl.float32)
    b_place = tl.full([BLOCK_C], -1, tl.int32)  # place of the selected row
    b_lost = tl.zeros([BLOCK_C], tl.float32)
    b_weight = tl.zeros([BLOCK_P], tl.float32)
    b_count = tl.zeros([BLOCK_P], tl.int32)
    for first in range(begin, end, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        b_row, m_p = rows_of_places(places, i_b, o_p, o_p < end, perm_batch, tokens)
        b_w = m_p.to(tl.float32)
        if places.weight is not None:
            b_w = tl.load(places.weight + i_b * weight_batch + b_row, mask=m_p, other=0.0)
        b_weight += b_w
        b_count += m_p.to(tl.int32)
        if END:
            if REDUCE == "first":
                found = tl.min(tl.where(m_p, o_p, 2147483647), 0)
                better = (b_place < 0) & (found < 2147483647)
            else:
                found = tl.max(tl.where(m_p, o_p, -1), 0)
                better = found >= 0
            b_place = tl.where(better, found, b_place)
        else:
            p_x = x + i_b * x_batch + b_row[:, None] * x_row + o_c[None, :]
            m_x = m_p[:, None] & m_c[None, :]
            b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
            if EXTREME:
                # NaN cannot be encoded as a larger number, since +inf may occur; it is tracked
                # separately.
                if REDUCE == "amin":
                    b_x = -b_x
                m_nan = (b_x != b_x) & m_x
                b_nan = tl.max(m_nan.to(tl.int32), 0)
                b_top = tl.max(tl.where(m_x & (m_nan == 0), b_x, -INF), 0)
                m_best = tl.where(b_nan[None, :] != 0, m_nan, m_x & (b_x == b_top[None, :]))
                b_found = tl.min(tl.where(m_best, o_p[:, None], 2147483647), 0)
                m_new = (b_nan != 0) | (b_place < 0) | (b_top > b_y)
                m_new = m_new & (b_found < 2147483647) & (b_y == b_y)
                b_top = tl.where(b_nan != 0, float("nan"), b_top)
                b_y = tl.where(m_new, b_top, b_y)
                b_place = tl.where(m_new, b_found, b_place)
            else:
                # Compensated sum: the rounding error is added to the next partial sum.
                b_part = tl.sum(b_w[:, None] * b_x, 0) + b_lost
                b_sum = b_y + b_part
                b_error = b_part - (b_sum - b_y)
                b_lost = tl.where(tl.abs(b_sum) < INF, b_error, 0.0)
                b_y = b_sum

    total = tl.sum(b_weight, 0)
    if places.weight is None:
        total = tl.sum(b_count, 0).to(tl.float32)
    tl.store(weight_sum + i_segment, total, mask=i % tiles == 0)
    p_y = y + i_segment * channels + o_c
    if EXTREME or END:
        m_there = b_place >= 0
        b_row, m_there = rows_of_places(places, i_b, b_place, m_there, perm_batch, tokens)
        if EXTREME:
            b_arg = tl.where(m_there, b_row, -1).to(tl.int32)
            tl.store(arg + i_segment * channels + o_c, b_arg, mask=m_c)
        b_bits = tl.load(x + i_b * x_batch + b_row * x_row + o_c, mask=m_there & m_c, other=0.0)
        tl.store(p_y, b_bits, mask=m_c)
    else:
        if REDUCE == "mean":
            # mean = sum of w x / sum of w
            b_y = tl.where(total == 0.0, 0.0, b_y / tl.where(total == 0.0, 1.0, total))
        tl.store(p_y, rounded(b_y, y.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def backward_kernel(
    dy, dweight_sum, y, weight_sum, arg, x, weight, segment_of_row, dx, dweight, x_batch, x_row,
    weight_batch, tokens, segments, channels, dy_batch, dy_row, count,
    REDUCE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < count
    o_b = o_row // tokens
    o_n = o_row % tokens
    b_s = tl.load(segment_of_row + o_row, mask=m_row, other=-1)
    m_some = b_s >= 0
    o_segment = o_b * segments + b_s
    b_w = tl.full([BLOCK_R], 1.0, tl.float32)
    if weight is not None:
        b_w = tl.load(weight + o_b * weight_batch + o_n, mask=m_row, other=0.0)
    b_total = tl.full([BLOCK_R], 1.0, tl.float32)
    if REDUCE == "mean":
        b_total = tl.load(weight_sum + o_segment, mask=m_some, other=1.0)
    m_dy = m_some & (b_total != 0.0)
    b_total = tl.where(m_dy, b_total, 1.0)

    b_dot = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, channels, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)[None, :]
        m_tile = m_dy[:, None] & (o_c < channels)
        p_dy = dy + (o_b * dy_batch + b_s * dy_row)[:, None] + o_c
        b_dy = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        if dweight is not None:
            p_x = x + (o_b * x_batch + o_n * x_row)[:, None] + o_c
            b_x = tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
            if REDUCE == "mean":
                p_y = y + (o_segment * channels)[:, None] + o_c
                b_x -= tl.load(p_y, mask=m_tile, other=0.0).to(tl.float32)
            # dw = (x - mean) . dy / total
            b_dot += tl.sum(b_x * b_dy, 1)
        if REDUCE == "amax" or REDUCE == "amin":
            p_arg = arg + (o_segment * channels)[:, None] + o_c
            b_arg = tl.load(p_arg, mask=m_tile, other=-1)
            b_dx = tl.where(b_arg == o_n[:, None], b_dy, 0.0)
        else:
            # dx = w / total dy
            b_dx = b_dy * (b_w / b_total)[:, None]
        p_dx = dx + (o_row * channels)[:, None] + o_c
        m_dx = m_row[:, None] & (o_c < channels)
        tl.store(p_dx, rounded(b_dx, dx.dtype.element_ty), mask=m_dx)
    if dweight is not None:
        b_dweight = tl.where(m_dy, b_dot / b_total, 0.0)
        if dweight_sum is not None:
            b_dweight += tl.load(dweight_sum + o_segment, mask=m_some, other=0.0)
        tl.store(dweight + o_row, b_dweight, mask=m_row)


def segment_reduce(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, perm = a.x, a.perm
    batch, tokens, channels = x.shape
    segments = a.offsets.shape[1] - 1
    place_count = tokens if perm is None else perm.shape[1]
    y = x.new_empty((batch, segments, channels))
    weight_sum = x.new_empty((batch, segments), dtype=torch.float32)
    extreme = a.reduce in ("amax", "amin")
    arg = x.new_empty(y.shape if extreme else (0,), dtype=torch.int32)
    block_c = min(CHANNELS, triton.next_power_of_2(max(channels, 1)))
    mean = triton.next_power_of_2(place_count // max(segments, 1) + 1)
    block_p = max(4, min(ELEMENTS // block_c, mean))
    tiles = max(1, triton.cdiv(channels, block_c))
    launch(
        reduce_kernel, batch * segments * tiles, x, x, Places(a.offsets, perm, a.weight), y,
        weight_sum, arg, x.stride(0), x.stride(1), a.offsets.stride(0), _batch_stride(perm),
        _batch_stride(a.weight), tokens, place_count, segments, channels, tiles, REDUCE=a.reduce,
        BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    return y, weight_sum, arg


def segment_reduce_backward(a: Any) -> tuple[Tensor, Tensor]:
    x, dy = a.x, a.dy
    batch, tokens, channels = x.shape
    dx = x.new_empty(x.shape)
    dweight = None
    if a.needs_dweight and a.weight is not None:
        dweight = x.new_empty(a.weight.shape, dtype=torch.float32)
    block_c = min(CHANNELS, triton.next_power_of_2(max(channels, 1)))
    block_r = max(1, BACKWARD_ELEMENTS // block_c)
    launch(
        backward_kernel, triton.cdiv(batch * tokens, block_r), x, dy, a.dweight_sum, a.y,
        a.weight_sum, a.arg, x, a.weight, _segment_of_row(a), dx, dweight, x.stride(0),
        x.stride(1), _batch_stride(a.weight), tokens, a.offsets.shape[1] - 1, channels,
        dy.stride(0), dy.stride(1), batch * tokens, REDUCE=a.reduce, BLOCK_R=block_r,
        BLOCK_C=block_c,
    )  # fmt: skip
    return dx, x.new_empty(0, dtype=torch.float32) if dweight is None else dweight


def _segment_of_row(a: Any) -> Tensor:
    """[B, N] int32: segment that a row is in, or that selects it; -1 for none."""
    batch, tokens, _ = a.x.shape
    segments = a.offsets.shape[1] - 1
    places = tokens if a.perm is None else a.perm.shape[1]
    place = torch.arange(places, dtype=torch.int32, device=a.x.device).repeat(batch, 1)
    segment = torch.searchsorted(a.offsets.contiguous(), place, right=True, out_int32=True) - 1
    row = place if a.perm is None else a.perm
    there = (segment >= 0) & (segment < segments) & (row >= 0) & (row < tokens)
    if a.reduce in ("first", "last"):
        # First or last place of each segment that names a valid row.
        bins = torch.where(there, segment, segments).long()
        none = places if a.reduce == "first" else -1
        chosen = place.new_full((batch, segments + 1), none)
        chosen = chosen.scatter_reduce(1, bins, place, "amin" if a.reduce == "first" else "amax")
        there = there & (chosen.gather(1, bins) == place)
    # One extra row after the last collects the places that name no row.
    found = place.new_full((batch, tokens + 1), -1)
    found.scatter_(1, torch.where(there, row, tokens).long(), torch.where(there, segment, -1))
    return found[:, :tokens].contiguous()


def _batch_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)
