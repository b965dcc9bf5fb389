"""Key rows that lists assemble: sink tokens, listed blocks, recent tokens, extra keys.
csrc/sparse/sparse_decode_attention/params.h has the same layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common import dot, lower_bound, rounded
from ..dense.kv_cache import PIECE, length_of, numbers, offsets_of, page_of

NOWHERE = tl.constexpr(2147483647)  # invalid position
TILE = tl.constexpr(128)  # list entries per step
BEFORE = tl.constexpr(16)  # preceding entries compared with each key per step


class Rope(NamedTuple):
    """Rotary tables [positions, pairs]; strides in elements."""

    cos: Tensor
    sin: Tensor
    cos_stride: int
    sin_stride: int


class KeyRow(NamedTuple):
    """Bounds of the parts of a key row."""

    entries: Any  # pointer to the list
    length: Any  # keys of the request
    sinks: Any  # number of sink tokens; the list begins here
    first: Any  # first entry in use
    last: Any  # end of the entries in use
    recent_begin: Any  # position of the first recent token
    list_end: Any
    cached: Any  # number of cached keys; extra keys begin here
    total: Any
    ascends: Any  # flag: the list is ascending


class Places(NamedTuple):
    """Pointers and masks of cache rows and of extra rows."""

    p_row: Any
    m_row: Any
    p_extra: Any
    m_extra: Any


class Columns(NamedTuple):
    """Columns of rows: first and second element of each pair, rotated, and the columns after the
    pairs."""

    first: Any
    second: Any
    rest: Any


@triton.jit
def key_row(
    indices, counts, indices_batch, indices_head, counts_batch, counts_head, entries, halvings,
    seqlens, capacity, num_sink, num_recent, seqlen_q, extra_count, i_b, i_h,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Bounds of a key row. The list is used from the first entry that is not entirely among the
    sink tokens to the first that is entirely past what a query sees through it."""
    length = length_of(seqlens, capacity, i_b)
    old = tl.maximum(length - num_recent, 0)
    sinks = tl.minimum(num_sink, old)
    i_list = tl.cast(i_h, tl.int64)
    p_list = indices + i_b * indices_batch + i_list * indices_head
    count = tl.load(counts + i_b * counts_batch + i_list * counts_head)
    count = tl.minimum(tl.maximum(count, 0), entries)

    o_end = tl.arange(0, 2)
    b_min = tl.where(o_end == 0, sinks // BLOCK_K, tl.cdiv(old, BLOCK_K))
    b_first = tl.zeros([2], tl.int32)
    b_at = lower_bound(p_list, b_first, b_first + count, b_min, halvings)
    descents = tl.zeros([], tl.int32)
    for i_entry in range(1, count, TILE):
        o_entry = i_entry + tl.arange(0, TILE)
        m_entry = o_entry < count
        b_id = tl.load(p_list + o_entry, mask=m_entry, other=0)
        b_before = tl.load(p_list + o_entry - 1, mask=m_entry, other=-1)
        descents += tl.sum((b_id <= b_before).to(tl.int32), 0)
    if descents > 0:
        b_at = b_first + count
        for i_entry in range(0, count, TILE):
            o_entry = i_entry + tl.arange(0, TILE)
            b_id = tl.load(p_list + o_entry, mask=o_entry < count, other=-2147483648)
            m_reached = b_id[None, :] >= b_min[:, None]
            b_at = tl.minimum(b_at, tl.min(tl.where(m_reached, o_entry[None, :], count), 1))
    first = tl.sum(tl.where(o_end == 0, b_at, 0), 0)
    last = tl.maximum(tl.sum(tl.where(o_end == 1, b_at, 0), 0), first)

    recent_begin = tl.maximum(length - seqlen_q + 1 - num_recent, 0)
    recent_begin = tl.where(num_recent == 0, length, recent_begin)
    list_end = sinks + (last - first) * BLOCK_K
    cached = list_end + length - recent_begin
    total = cached + extra_count
    return KeyRow(
        p_list, length, sinks, first, last, recent_begin, list_end, cached, total, descents == 0
    )


@triton.jit
def find(row, cache, i_b, o_t, BLOCK_K: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Positions of keys o_t of the row in the request, NOWHERE if not in the cache, and their
    pages."""
    m_list = (o_t >= row.sinks) & (o_t < row.list_end)
    o_listed = o_t - row.sinks
    o_entry = row.first + o_listed // BLOCK_K
    b_id = tl.load(row.entries + o_entry, mask=m_list, other=0)
    m_id = (b_id >= 0) & (b_id < tl.cdiv(row.length, BLOCK_K))
    if row.ascends == 0:  # an entry counts only if it exceeds all entries before it
        last = tl.max(tl.where(m_list, o_entry, 0), 0)
        for i_before in range(row.first, last, BEFORE):
            o_before = i_before + tl.arange(0, BEFORE)
            b_before = tl.load(row.entries + o_before, mask=o_before < last, other=0)
            m_after = (o_before[None, :] < o_entry[:, None]) & (b_before[None, :] >= b_id[:, None])
            m_id = m_id & (tl.sum(m_after.to(tl.int32), 1) == 0)
    o_own = tl.where(m_id, b_id, 0) * BLOCK_K + o_listed % BLOCK_K
    m_own = m_id & (o_own >= row.sinks) & (o_own < row.length)
    o_j = tl.where(o_t < row.list_end, o_t, row.recent_begin + (o_t - row.list_end))
    o_j = tl.where(m_list, o_own, o_j)
    m_j = (o_t < row.cached) & (m_own | (m_list == 0))
    o_page = page_of(cache, i_b, o_j, m_j, PAGE_SIZE)
    return tl.where(m_j & (o_page >= 0), o_j, NOWHERE), tl.maximum(o_page, 0)


@triton.jit
def places_of(rows, extra, row, cache, i_b, i_kv, o_t, o_j, o_page, PAGE_SIZE: tl.constexpr):
    m_extra = (o_t >= row.cached) & (o_t < row.total)
    p_extra = None
    if extra is not None:
        o_extra = (o_t - row.cached).to(tl.int64) * extra.seq + i_kv.to(tl.int64) * extra.head
        p_extra = extra.data + i_b * extra.batch + o_extra
    p_row = rows.data + offsets_of(rows, cache, o_page, o_j, i_kv, PAGE_SIZE)
    return Places(p_row, o_j != NOWHERE, p_extra, m_extra)


@triton.jit
def load_columns(places, o_col, m_col, dtype: tl.constexpr):
    """Loads cache rows and extra rows separately: selecting between pointers would lose their
    alignment. float8 codes are decoded to dtype, which extra rows are converted to."""
    m_tile = places.m_row[:, None] & m_col[None, :]
    b_x = tl.load(places.p_row[:, None] + o_col[None, :], mask=m_tile, other=0.0)
    b_x = numbers(b_x, dtype)
    if places.p_extra is not None:
        m_extra = places.m_extra[:, None] & m_col[None, :]
        b_extra = tl.load(places.p_extra[:, None] + o_col[None, :], mask=m_extra, other=0.0)
        b_x = tl.where(m_extra, b_extra.to(b_x.dtype), b_x)
    return b_x


@triton.jit
def load_turned(
    places, o_turn, rope, positions,
    DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Rows with their column pairs rotated by rows o_turn of the tables; extra rows are not
    rotated."""
    b_first = None
    b_second = None
    b_rest = None
    if PAIRS > 0:
        o_pair = tl.arange(0, BLOCK_P)
        m_pair = o_pair < PAIRS
        if INTERLEAVED:
            o_col = tl.arange(0, 2 * BLOCK_P)
            b_xy = load_columns(places, o_col, o_col < 2 * PAIRS, dtype)
            b_x, b_y = tl.split(tl.reshape(b_xy, [b_xy.shape[0], BLOCK_P, 2]))
        else:
            b_x = load_columns(places, o_pair, m_pair, dtype)
            b_y = load_columns(places, o_pair + PAIRS, m_pair, dtype)
        o_turn = tl.minimum(tl.maximum(o_turn, 0), positions - 1).to(tl.int64)
        m_table = places.m_row[:, None] & m_pair[None, :]
        p_cos = rope.cos + (o_turn * rope.cos_stride)[:, None] + o_pair[None, :]
        p_sin = rope.sin + (o_turn * rope.sin_stride)[:, None] + o_pair[None, :]
        b_cos = tl.load(p_cos, mask=m_table, other=1.0)
        b_sin = tl.load(p_sin, mask=m_table, other=0.0)
        b_wide_x = b_x.to(tl.float32)
        b_wide_y = b_y.to(tl.float32)
        b_first = rounded(b_wide_x * b_cos - b_wide_y * b_sin, b_x.dtype)
        b_second = rounded(b_wide_x * b_sin + b_wide_y * b_cos, b_x.dtype)
    if 2 * PAIRS < DIM:
        o_rest = 2 * PAIRS + tl.arange(0, BLOCK_R)
        b_rest = load_columns(places, o_rest, o_rest < DIM, dtype)
    return Columns(b_first, b_second, b_rest)


@triton.jit
def products(queries, keys, DIM: tl.constexpr, PAIRS: tl.constexpr):
    # S = Q K^T over both elements of the pairs and the remaining columns
    if PAIRS > 0:
        b_qk = dot(queries.first, tl.trans(keys.first)) + dot(queries.second, tl.trans(keys.second))
        if 2 * PAIRS < DIM:
            b_qk += dot(queries.rest, tl.trans(keys.rest))
    else:
        b_qk = dot(queries.rest, tl.trans(keys.rest))
    return b_qk


@triton.jit
def long_products(queries, keys, first: tl.constexpr, DIM: tl.constexpr, dtype: tl.constexpr):
    """Q K^T over columns first to DIM - 1, in pieces of PIECE columns."""
    b_qk = tl.zeros([queries.p_row.shape[0], keys.p_row.shape[0]], tl.float32)
    for c in range(first, DIM, PIECE):
        o_col = c + tl.arange(0, PIECE)
        b_q = load_columns(queries, o_col, o_col < DIM, dtype)
        b_k = load_columns(keys, o_col, o_col < DIM, dtype)
        b_qk += dot(b_q, tl.trans(b_k))
    return b_qk
