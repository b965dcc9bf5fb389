"""Compacts kept tokens of a cache into lower slots. One program owns one head of one request and
moves its tokens in order: a chunk is loaded, then stored. Later chunks load from higher slots than
those already stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill.select.rules import rows_of_request

from ..common import INTERPRETED, Rows, launch, rounded
from .attention_column_scores import clamped

TURN = tl.constexpr(6.283185307179586)


# Arguments excluded from specialization: a new length does not recompile.
SIZES = [
    "keep_batch", "keep_head", "counts_batch", "counts_head", "entries", "table_stride",
    "page_count", "page_size", "capacity", "heads", "pairs",
]  # fmt: skip


class Lists(NamedTuple):
    """Kept tokens of one head of one request."""

    keep: Any
    count: Any


class Pages(NamedTuple):
    """Page table of all requests, or None; stride in elements."""

    table: Any
    stride: Any
    count: Any
    size: Any


@triton.jit
def head_of_program(heads):
    """Batch and head of this program."""
    i = tl.program_id(0)
    return (i // heads).to(tl.int64), (i % heads).to(tl.int64)


@triton.jit
def list_of(keep, counts, keep_batch, keep_head, counts_batch, counts_head, entries, i_b, i_h):
    count = tl.load(counts + i_b * counts_batch + i_h * counts_head)
    count = tl.minimum(tl.maximum(count, 0), entries)
    return Lists(keep + i_b * keep_batch + i_h * keep_head, count)


@triton.jit
def offset_of(rows, pages, i_b, o_t, m_t):
    """Element offsets of tokens in head 0, and the mask of tokens whose page exists. Without a page
    table, request b has only page b."""
    o_page = i_b
    o_row = o_t.to(tl.int64)
    if pages.table is not None:
        p_page = pages.table + i_b * pages.stride + o_t // pages.size
        o_page = tl.load(p_page, mask=m_t, other=-1).to(tl.int64)
        o_row = o_row % pages.size
        m_t = m_t & (o_page >= 0) & (o_page < pages.count)
    return o_page * rows.batch + o_row * rows.seq, m_t


@triton.jit
def sine_of_turns(b_x):
    """sin(2 pi x) for |x| <= 1/4, absolute error 1e-8."""
    b_z = b_x * TURN
    b_u = b_z * b_z
    b_p = 1.6059044e-10 * b_u - 2.5052108e-8
    b_p = b_p * b_u + 2.7557319e-6
    b_p = b_p * b_u - 1.9841270e-4
    b_p = b_p * b_u + 8.3333333e-3
    b_p = b_p * b_u - 0.166666667
    return b_z * b_u * b_p + b_z


@triton.jit
def turned(b_x, b_other, b_sign, b_delta, turns, rest, o_pair, m_pair):
    """Rotates by each pair's angle: b_x cos + sign b_other sin. Turns per step are held in two
    floats and whole revolutions are subtracted, so that large steps keep their precision."""
    b_turns = tl.load(turns + o_pair, mask=m_pair, other=0.0)[None, :]
    b_rest = tl.load(rest + o_pair, mask=m_pair, other=0.0)[None, :]
    b_step = b_delta.to(tl.float32)[:, None]
    # Split into two parts of 12 bits each, so that the partial products are exact.
    b_high = (b_turns.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    b_step_high = (b_step.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    b_step_low = b_step - b_step_high
    b_low = b_turns - b_high
    b_angle = b_step_high * b_high
    b_angle -= tl.floor(b_angle + 0.5)
    b_middle = b_step_high * b_low
    b_middle -= tl.floor(b_middle + 0.5)
    b_cross = b_step_low * b_high
    b_cross -= tl.floor(b_cross + 0.5)
    b_angle = b_angle + b_middle + b_cross + (b_step_low * b_low + b_step * b_rest)
    b_angle -= tl.floor(b_angle + 0.5)
    # tl.sin is avoided: its path for large arguments uses local memory.
    b_size = tl.abs(b_angle)
    b_sine = sine_of_turns(tl.minimum(b_size, 0.5 - b_size))
    b_sine = tl.where(b_angle < 0.0, -b_sine, b_sine)
    return b_x * sine_of_turns(0.25 - b_size) + b_sign[None, :] * b_other * b_sine


@triton.jit(do_not_specialize=SIZES)
def move_kernel(
    rows, keep, counts, keep_batch, keep_head, counts_batch, counts_head, entries, lengths, table,
    table_stride, page_count, page_size, capacity, heads, turns, rest, pairs,
    DIM: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b, i_h = head_of_program(heads)
    pages = Pages(table, table_stride, page_count, page_size)
    lists = list_of(
        keep, counts, keep_batch, keep_head, counts_batch, counts_head, entries, i_b, i_h
    )
    length = clamped(lengths, i_b, capacity)
    p_head = rows.data + i_h * rows.head
    o_d = tl.arange(0, BLOCK_D)
    for first in range(0, lists.count, BLOCK_T):
        o_to = first + tl.arange(0, BLOCK_T)
        o_from = tl.load(lists.keep + o_to, mask=o_to < lists.count, other=0)
        m_t = (o_to < lists.count) & (o_from > o_to) & (o_from < length)
        o_source, m_t = offset_of(rows, pages, i_b, o_from, m_t)
        o_target, m_t = offset_of(rows, pages, i_b, o_to, m_t)
        m_x = m_t[:, None] & (o_d < DIM)[None, :]
        b_x = tl.load(p_head + o_source[:, None] + o_d[None, :], mask=m_x, other=0.0)
        if turns is not None:
            m_pair = o_d < 2 * pairs
            if INTERLEAVED:
                o_pair = o_d // 2
                o_other = tl.where(m_pair, o_d + 1 - 2 * (o_d % 2), o_d)
                b_sign = tl.where(o_d % 2 == 0, -1.0, 1.0)
            else:
                o_pair = tl.where(o_d < pairs, o_d, o_d - pairs)
                o_other = tl.where(m_pair, tl.where(o_d < pairs, o_d + pairs, o_d - pairs), o_d)
                b_sign = tl.where(o_d < pairs, -1.0, 1.0)
            p_other = p_head + o_source[:, None] + o_other[None, :]
            b_other = tl.load(p_other, mask=m_x, other=0.0).to(tl.float32)
            b_wide = b_x.to(tl.float32)
            b_turned = turned(b_wide, b_other, b_sign, o_to - o_from, turns, rest, o_pair, m_pair)
            b_x = rounded(tl.where(m_pair[None, :], b_turned, b_wide), b_x.dtype)
        tl.debug_barrier()  # all warps have loaded before any of them stores
        tl.store(p_head + o_target[:, None] + o_d[None, :], b_x, mask=m_x)


@triton.jit(do_not_specialize=SIZES)
def sum_kernel(
    rows, keep, counts, keep_batch, keep_head, counts_batch, counts_head, entries, lengths, table,
    table_stride, page_count, page_size, capacity, heads, sums, dropped,
    DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens that are not in the list."""
    i_b, i_h = head_of_program(heads)
    pages = Pages(table, table_stride, page_count, page_size)
    lists = list_of(
        keep, counts, keep_batch, keep_head, counts_batch, counts_head, entries, i_b, i_h
    )
    length = clamped(lengths, i_b, capacity)
    o_d = tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    number = 0
    for first in range(0, length, BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        # Binary search for the number of smaller entries: the token is listed if the entry there
        # equals it.
        o_low = tl.zeros([BLOCK_T], tl.int32)
        o_high = o_low + lists.count
        for _ in range(31):
            o_middle = (o_low + o_high) // 2
            b_slot = tl.load(lists.keep + o_middle, mask=o_middle < lists.count, other=2147483647)
            m_below = (b_slot < o_t) & (o_low < o_high)
            o_high = tl.where((o_low < o_high) & (b_slot >= o_t), o_middle, o_high)
            o_low = tl.where(m_below, o_middle + 1, o_low)
        b_slot = tl.load(lists.keep + o_low, mask=o_low < lists.count, other=-1)
        m_t = (o_t < length) & (b_slot != o_t)
        number += tl.sum(m_t.to(tl.int32), 0)
        o_source, m_t = offset_of(rows, pages, i_b, o_t, m_t)
        p_x = rows.data + i_h * rows.head + o_source[:, None] + o_d[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & (o_d < DIM)[None, :], other=0.0)
        b_sum += tl.sum(b_x.to(tl.float32), 0)
    i_row = i_b * heads + i_h
    tl.store(sums + i_row * DIM + o_d, b_sum, mask=o_d < DIM)
    if dropped is not None:
        tl.store(dropped + i_row, number)


def kv_cache_compact(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, entries = a.keep.shape[0], a.keep.shape[-1]
    pages, size, heads = a.k_cache.shape[:3]
    per_head = a.keep.dim() == 3

    def sums(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return a.k_cache.new_empty(shape if a.compensation else (0,), dtype=dtype)

    k_sum, v_sum = (sums(batch, heads, c.shape[3]) for c in (a.k_cache, a.v_cache))
    dropped = sums(batch, heads, dtype=torch.int32)
    table_stride = a.block_table.stride(0) if a.block_table is not None else 0
    places = (
        a.keep, a.counts, a.keep.stride(0), a.keep.stride(1) if per_head else 0,
        a.counts.stride(0), a.counts.stride(1) if per_head else 0, entries, a.seqlens_k,
        a.block_table, table_stride, pages, size, rows_of_request(a.k_cache, a.block_table), heads,
    )  # fmt: skip
    for cache, total, number in ((a.k_cache, k_sum, dropped), (a.v_cache, v_sum, None)):
        turns: tuple[Any, ...] = (None, None, 0)
        if a.rerotate is not None and cache is a.k_cache:
            turns = (*a.rerotate, a.rerotate.shape[1])
        rows = Rows(cache, cache.stride(0), cache.stride(1), cache.stride(2))
        dim = cache.shape[3]
        options = {
            "DIM": dim,
            "BLOCK_T": 64 if INTERPRETED.value else max(4096 // triton.next_power_of_2(dim), 8),
            "BLOCK_D": triton.next_power_of_2(dim),
            "num_warps": 4,
            "num_stages": 1,
        }
        if a.compensation:
            launch(sum_kernel, batch * heads, cache, rows, *places, total, number, **options)
        if entries > 0:
            launch(
                move_kernel, batch * heads, cache, rows, *places, *turns,
                INTERLEAVED=a.interleaved, **options,
            )  # fmt: skip
    return a.counts.clamp(0, entries), k_sum, v_sum, dropped
