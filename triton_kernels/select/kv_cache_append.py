"""Writes rows of new keys, values and queries, after rotary embedding and in the dtype of the
destination. A program owns a token and a few heads. Products, sums and quotients are rounded one by
one, as on every backend, so that float8 rounding gives identical bits everywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import FLOAT_MAX, Rows, rounded
from ..float8 import float8_codes

LARGEST = tl.constexpr(448.0)
MIN_SCALE = tl.constexpr(2.0**-126)

# Arguments excluded from specialization: a new length does not recompile.
SIZES = [
    "slots_stride", "pages", "page_size", "heads", "positions_stride", "table", "scale_page",
    "scale_row", "scale_head",
]  # fmt: skip


class Rope(NamedTuple):
    """Rotary tables [table, pairs]; each token takes one row."""

    cos: Tensor
    sin: Tensor
    cos_stride: int
    sin_stride: int
    positions: Tensor


@triton.jit(do_not_specialize=SIZES)
def append_kernel(
    new, cache, slots, slots_stride, pages, page_size, heads, rope, positions_stride, table, scale,
    token_scale, scale_page, scale_row, scale_head,
    DIM: tl.constexpr, PAIRS: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    FLOAT8: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """slots None: row t of a tensor [T, heads, DIM] is written in place of row t. scale is loaded
    per head; token_scale is stored at the page, row and head of the token."""
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    there = heads  # number of heads that are written
    o_place = i_t * cache.seq
    o_scale = i_t - i_t
    if slots is not None:
        i_slot = tl.load(slots + i_t * slots_stride).to(tl.int64)
        size = tl.cast(page_size, tl.int64)
        there = tl.where((i_slot >= 0) & (i_slot < pages * size), heads, 0)
        i_page = tl.maximum(i_slot, 0) // tl.maximum(size, 1)
        i_row = tl.maximum(i_slot, 0) % tl.maximum(size, 1)
        o_place = i_page * cache.batch + i_row * cache.seq
        o_scale = i_page * scale_page + i_row * scale_row
    m_h = o_h < there
    m_x = m_h[:, None] & (o_d < DIM)[None, :]
    o_h = o_h.to(tl.int64)
    p_row = new.data + i_t * new.seq + o_h[:, None] * new.head
    b_x = tl.load(p_row + o_d[None, :], mask=m_x, other=0.0)
    if rope is not None:
        i_at = tl.load(rope.positions + i_t * positions_stride).to(tl.int64)
        i_at = tl.minimum(tl.maximum(i_at, 0), table - 1)
        m_pair = (o_d >= OFFSET) & (o_d < OFFSET + 2 * PAIRS)
        o_turn = tl.where(m_pair, o_d - OFFSET, 0)
        if INTERLEAVED:
            o_pair = o_turn // 2
            m_first = o_turn % 2 == 0
            o_other = tl.where(m_first, o_d + 1, o_d - 1)
        else:
            m_first = o_turn < PAIRS
            o_pair = tl.where(m_first, o_turn, o_turn - PAIRS)
            o_other = tl.where(m_first, o_d + PAIRS, o_d - PAIRS)
        b_cos = tl.load(rope.cos + i_at * rope.cos_stride + o_pair, mask=m_pair, other=1.0)
        b_sin = tl.load(rope.sin + i_at * rope.sin_stride + o_pair, mask=m_pair, other=0.0)
        m_other = m_h[:, None] & m_pair[None, :]
        b_other = tl.load(p_row + o_other[None, :], mask=m_other, other=0.0).to(tl.float32)
        b_wide = b_x.to(tl.float32)
        # x cos - y sin equals x cos + (-sin) y bit for bit.
        b_side = tl.where(m_first, -b_sin, b_sin)[None, :] * b_other
        b_turned = b_wide * b_cos[None, :] + b_side
        b_x = rounded(tl.where(m_pair[None, :], b_turned, b_wide), tl.float32)
    if FLOAT8:
        b_x = b_x.to(tl.float32)
        if token_scale is not None:
            b_size = tl.abs(b_x)
            b_max = tl.max(tl.where(b_size <= FLOAT_MAX, b_size, 0.0), 1)
            b_scale = tl.div_rn(b_max, tl.zeros_like(b_max) + LARGEST)
            b_scale = tl.where(b_scale < MIN_SCALE, 1.0, b_scale)
            tl.store(token_scale + o_scale + o_h * scale_head, b_scale, mask=m_h)
            b_x = tl.div_rn(b_x, b_scale[:, None] + tl.zeros_like(b_x))
        elif scale is not None:
            b_scale = tl.load(scale + o_h * scale_head, mask=m_h, other=1.0)
            b_x = tl.div_rn(b_x, b_scale[:, None] + tl.zeros_like(b_x))
        b_out = float8_codes(b_x)
    else:
        b_out = rounded(b_x, cache.data.dtype.element_ty)
    p_out = cache.data + o_place + o_h[:, None] * cache.head + o_d[None, :]
    tl.store(p_out, b_out, mask=m_x)


def kv_cache_append(a: Any) -> Tensor:
    turned = a.k.new_empty(0 if a.q is None else a.q.shape)
    rope, pairs, table, positions_stride = None, 0, 0, 0
    if a.cos is not None and a.sin is not None and a.positions is not None:
        rope = Rope(a.cos, a.sin, a.cos.stride(0), a.sin.stride(0), a.positions)
        (table, pairs), positions_stride = a.cos.shape, a.positions.stride(0)
    turn: tuple[Any, Any] = (rope, positions_stride, table), (pairs, a.rope_offset, a.interleaved)
    stay: tuple[Any, Any] = (None, 0, 0), (0, 0, False)
    for cache, new, turns, scale, scale_out in (
        (a.k_cache, a.k, turn, a.k_scale, a.k_scale_out),
        (a.v_cache, a.v, stay, a.v_scale, a.v_scale_out),
    ):
        if cache is None or new is None:
            continue
        float8 = cache.dtype == torch.float8_e4m3fn
        held = cache.view(torch.uint8) if float8 else cache
        to = Rows(held, cache.stride(0), cache.stride(1), cache.stride(2))
        scale_head = scale.stride(0) if scale is not None and scale.shape[0] > 1 else 0
        steps = (0, 0, scale_head) if scale_out is None else scale_out.stride()
        places = (a.slots, a.slots.stride(0), *cache.shape[:2])
        _launch(new, to, places, *turns, (scale, scale_out, *steps), float8)
    if a.q is not None:
        to = Rows(turned, 0, turned.stride(0), turned.stride(1))
        _launch(a.q, to, (None, 0, 0, 1), *turn, (None, None, 0, 0, 0), False)
    return turned


def _launch(
    new: Tensor,
    to: Rows,
    places: tuple[Any, ...],
    turns: tuple[Any, ...],
    columns: tuple[int, int, bool],
    scales: tuple[Any, ...],
    float8: bool,
) -> None:
    (tokens, heads, dim), (pairs, offset, interleaved) = new.shape, columns
    if new.numel() == 0:
        return
    block_d = triton.next_power_of_2(dim)
    block_h = min(triton.next_power_of_2(heads), max(4096 // block_d, 1))
    rows = Rows(new, 0, new.stride(0), new.stride(1))
    with torch.cuda.device_of(new):
        # No FMA contraction: each product is rounded before the addition.
        append_kernel[(tokens, triton.cdiv(heads, block_h))](
            rows, to, *places, heads, *turns, *scales, DIM=dim, PAIRS=pairs,
            OFFSET=offset, INTERLEAVED=interleaved, FLOAT8=float8, BLOCK_H=block_h,
            BLOCK_D=block_d, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
