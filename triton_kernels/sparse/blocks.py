"""Iteration over block lists: the keys visible to a query tile, the queries that see a key tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common import FAR, Rows, lower_bound, program, span
from ..select.hip_block_select import find_sequence

NOWHERE = tl.constexpr(FAR)  # invalid position
PAGE_SIZES = ["table_stride", "page_count", "page_size"]


class Shape(NamedTuple):
    """Compile-time choices of the kernels that attend to lists."""

    GROUP: tl.constexpr  # query heads that share a list and keys
    HEAD_DIM: tl.constexpr
    VALUE_DIM: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_V: tl.constexpr
    CAUSAL: tl.constexpr
    BLOCK_Q: tl.constexpr
    BLOCK_K: tl.constexpr


class Ends(NamedTuple):
    """Cumulative lengths of packed queries and keys, and lengths of keys; int32 or None."""

    q: Tensor | None
    k: Tensor | None
    lengths: Tensor | None


class Sizes(NamedTuple):
    """Sizes of a call. A kernel takes them one by one: Triton would specialize members of a
    tuple."""

    requests: Any  # number of packed requests; 1 if they are not packed
    seqlen_q: Any
    seqlen_k: Any
    num_sink: Any
    num_recent: Any
    list_heads: Any
    list_rows: Any
    entries: Any
    row_heads: Any
    shared: Any


class QueryTile(NamedTuple):
    """Rows of a query tile. Query i sees the keys before b_end."""

    o_i: Any
    o_h: Any
    m_row: Any
    b_end: Any
    first: Any  # first query
    first_end: Any  # b_end of the first query
    last_end: Any  # b_end of the last query


class KeyWalk(NamedTuple):
    """Numbering of the keys visible to a query tile: sink keys, listed keys, recent keys."""

    p_ids: Any
    sinks: Any  # number of sink keys; the list begins here
    list_end: Any
    recent: Any  # start of the recent keys, a tile boundary
    total: Any
    full: Any  # keys before it are visible to all queries; a tile boundary
    listed_end: Any  # end of positions that any query sees through the list
    recent_begin: Any  # position of the first recent key
    num_recent: Any
    end: Any  # end of positions
    grid: Any = None  # set for blocks of a map


@triton.jit
def length_of(lengths, seqlen_k, i_b):
    length = seqlen_k
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + i_b), 0), seqlen_k)
    return length


class Request(NamedTuple):
    """Ranges of queries and keys of one request, packed or in a batch."""

    i_b: Any
    i_r: Any  # block of queries within the request
    q_start: Any
    queries: Any
    k_start: Any
    length: Any


@triton.jit
def request_of(ends, sizes, i_b, i_r, shape):
    """Request that owns row i_r of the lists. For a row of no request, i_r lies past all of its
    queries."""
    q_start = i_r - i_r
    queries = sizes.seqlen_q
    if ends.q is not None:
        i_seq = find_sequence(ends.q, sizes.requests, sizes.seqlen_q, shape.BLOCK_Q, i_r)
        q_start, queries = span(ends.q, sizes.seqlen_q, sizes.seqlen_q, i_seq)
        i_r -= q_start // shape.BLOCK_Q + i_seq
        i_r = tl.where(i_r < 0, sizes.list_rows, i_r)
        i_b = i_seq.to(tl.int64)
    length = length_of(ends.lengths, sizes.seqlen_k, i_b)
    k_start = q_start - q_start
    if ends.k is not None:
        k_start, length = span(ends.k, sizes.seqlen_k, sizes.seqlen_k, i_b)
    return Request(i_b, i_r, q_start, queries, k_start, length)


class KeyTileRequest(NamedTuple):
    """Request of a key tile: starts of its queries, keys and list rows if packed."""

    i_b: Any
    i_tile: Any  # key tile within the request
    q_start: Any
    queries: Any
    k_start: Any
    keys: Any  # rows of k
    length: Any  # number of valid keys
    first_row: Any  # None: 0


@triton.jit
def key_tile_request(ends, sizes, i_b, i_tile, shape):
    """Request that owns key tile i_tile of batch i_b. For a tile of no request, i_tile lies past
    all of its keys. Packed key tiles are numbered like rows of lists."""
    k_start = i_tile - i_tile
    keys = sizes.seqlen_k
    if ends.k is not None:
        i_seq = find_sequence(ends.k, sizes.requests, sizes.seqlen_k, shape.BLOCK_N, i_tile)
        k_start, keys = span(ends.k, sizes.seqlen_k, sizes.seqlen_k, i_seq)
        i_tile -= k_start // shape.BLOCK_N + i_seq
        i_tile = tl.where(i_tile < 0, tl.cdiv(keys, shape.BLOCK_N), i_tile)
        i_b = i_seq.to(tl.int64)
    length = keys
    if ends.k is None:
        length = length_of(ends.lengths, sizes.seqlen_k, i_b)
    q_start = k_start - k_start
    queries = sizes.seqlen_q
    first_row = None
    if ends.q is not None:
        q_start, queries = span(ends.q, sizes.seqlen_q, sizes.seqlen_q, i_b)
        first_row = q_start // shape.BLOCK_Q + i_b.to(tl.int32)
    return KeyTileRequest(i_b, i_tile, q_start, queries, k_start, keys, length, first_row)


@triton.jit
def rows_from(rows, i_b, start):
    offset = i_b * rows.batch + start.to(tl.int64) * rows.seq
    return Rows(rows.data + offset, 0, rows.seq, rows.head, rows.line)


@triton.jit
def ends_of(o_i, length, seqlen_q, CAUSAL: tl.constexpr):
    o_end = o_i - o_i + length
    if CAUSAL:
        o_end += o_i + 1 - seqlen_q
    return o_end


@triton.jit
def query_tile(request, i_tile, i_h, shape):
    first_query = request.i_r * shape.BLOCK_Q
    first_row = i_tile * shape.BLOCK_M
    o_row = first_row + tl.arange(0, shape.BLOCK_M)
    o_i = first_query + o_row // shape.GROUP
    m_row = (o_row < shape.BLOCK_Q * shape.GROUP) & (o_i < request.queries)
    o_h = i_h * shape.GROUP + o_row % shape.GROUP
    first = first_query + first_row // shape.GROUP
    last = tl.minimum((first_row + shape.BLOCK_M - 1) // shape.GROUP, shape.BLOCK_Q - 1)
    last = tl.minimum(first_query + last, request.queries - 1)
    first_end = tl.maximum(ends_of(first, request.length, request.queries, shape.CAUSAL), 0)
    last_end = tl.maximum(ends_of(last, request.length, request.queries, shape.CAUSAL), 0)
    b_end = ends_of(o_i, request.length, request.queries, shape.CAUSAL)
    return QueryTile(o_i, o_h, m_row, b_end, first, first_end, last_end)


@triton.jit
def listed_queries(ends, sizes, tiles, shape):
    """Batch, head and list row of this program, its request, and its tile of queries."""
    i_block, i_h, i_b = program(sizes.list_rows * tiles, sizes.row_heads)
    # Reversed block order: under a causal mask the last queries have most keys, so they start
    # first.
    i_block = sizes.list_rows * tiles - 1 - i_block
    i_r = i_block // tiles
    request = request_of(ends, sizes, i_b, i_r, shape)
    return i_b, i_h, i_r, request, query_tile(request, i_block % tiles, i_h, shape)


@triton.jit
def key_walk(ids, counts, halvings, sizes, i_b, i_h, i_r, tile, length, shape):
    num_sink = sizes.num_sink
    num_recent = sizes.num_recent
    BLOCK_K: tl.constexpr = shape.BLOCK_K
    i_list = tl.minimum(i_h, sizes.list_heads - 1)
    i_row = (i_b * sizes.list_heads + i_list) * sizes.list_rows + i_r
    p_ids = ids + i_row * sizes.entries
    first_listed = tl.maximum(tile.first_end - num_recent, 0)
    last_listed = tl.maximum(tile.last_end - num_recent, 0)
    o_part = tl.arange(0, 4)
    b_min = tl.where(o_part == 0, num_sink // BLOCK_K, tl.cdiv(num_sink, BLOCK_K))
    b_min = tl.where(o_part == 2, first_listed // BLOCK_K, b_min)
    b_min = tl.where(o_part == 3, tl.cdiv(last_listed, BLOCK_K), b_min)
    b_begin = tl.zeros([4], tl.int32)
    b_at = lower_bound(p_ids, b_begin, b_begin + tl.load(counts + i_row), b_min, halvings)
    at_sink = tl.sum(tl.where(o_part == 0, b_at, 0), 0)
    first = tl.sum(tl.where(o_part == 1, b_at, 0), 0)
    full = tl.maximum(tl.sum(tl.where(o_part == 2, b_at, 0), 0), first)
    last = tl.maximum(tl.sum(tl.where(o_part == 3, b_at, 0), 0), first)

    # If listed, the block in which the sink keys end counts as sink keys in whole.
    sinks = tl.where(first > at_sink, tl.cdiv(num_sink, BLOCK_K) * BLOCK_K, num_sink)
    sinks = tl.minimum(sinks, tile.last_end)
    list_end = sinks + (last - first) * BLOCK_K
    recent_begin = tl.where(num_recent == 0, tile.last_end, tile.first_end - num_recent)
    recent_begin = tl.minimum(tl.maximum(recent_begin, sinks), tile.last_end)
    recent = tl.cdiv(list_end, shape.BLOCK_N) * shape.BLOCK_N
    full = tl.where(tile.first_end < sinks, 0, sinks + (full - first) * BLOCK_K)
    total = tl.where(num_recent == 0, list_end, recent + (tile.last_end - recent_begin))
    return KeyWalk(
        p_ids + first, sinks, list_end, recent, total, full // shape.BLOCK_N * shape.BLOCK_N,
        last_listed, recent_begin, num_recent, length,
    )  # fmt: skip


@triton.jit
def find_listed_keys(walk, o_t, BLOCK_K: tl.constexpr):
    """Positions of keys o_t, NOWHERE if no query of the tile sees the key."""
    o_listed = o_t - walk.sinks
    m_list = (o_listed >= 0) & (o_t < walk.list_end)
    b_id = tl.load(walk.p_ids + o_listed // BLOCK_K, mask=m_list, other=0)
    o_own = b_id * BLOCK_K + o_listed % BLOCK_K
    o_j = tl.where(o_t < walk.sinks, o_t, NOWHERE)
    o_j = tl.where(m_list & (o_own < walk.listed_end), o_own, o_j)
    m_recent = (o_t >= walk.recent) & (o_t < walk.total)
    return tl.where(m_recent, walk.recent_begin + (o_t - walk.recent), o_j)


@triton.jit
def seen_in_front(walk, t, o_t, o_j, b_end):
    """Causal visibility of the key tile that begins at key t. Each key counts once: as a sink key,
    else as a listed or a recent key."""
    recent = t >= walk.recent
    o_j = tl.where((o_t < walk.sinks) | recent, o_j, o_j + walk.num_recent)
    b_from = tl.where(recent, b_end - walk.num_recent, 0)
    return (o_j[None, :] < b_end[:, None]) & (o_j[None, :] >= b_from[:, None])


class QueryWalk(NamedTuple):
    """Numbering of the query rows that see a key tile: first rows that see some of it as sink or
    recent keys, then rows whose lists hold a block of it. Each query has one row per head."""

    p_rows: Any
    p_bits: Any
    first_row: Any  # first row in the lists of a packed request, None: 0
    begin: Any  # first query that sees some of the tile as sink or recent keys
    ends: Any  # number of rows of these queries
    listed: Any  # start of the listed rows, a tile boundary
    full: Any  # rows from here on see all keys of the tile; a tile boundary
    total: Any
    num_sink: Any
    num_recent: Any
    end: Any  # number of queries
    length: Any
    grid: Any = None  # set for blocks of a map


@triton.jit
def query_walk(lists, wide, halvings, sizes, request, i_b, i_h, WIDTH: tl.constexpr, shape):
    """Numbering for the key tile of a request, in transposed lists of `wide` blocks of WIDTH
    keys."""
    num_sink = sizes.num_sink
    num_recent = sizes.num_recent
    length = request.length
    seqlen_q = request.queries
    first_row = request.first_row
    BLOCK_N: tl.constexpr = shape.BLOCK_N
    ROWS: tl.constexpr = shape.BLOCK_Q * shape.GROUP  # rows of a list
    first = request.i_tile * BLOCK_N
    last = tl.minimum(first + BLOCK_N, length) - 1
    # Queries begin .. end - 1 see some key of the tile as a sink or recent key.
    begin = first - first
    end = tl.where(first < num_sink, seqlen_q, 0)
    # List rows from some_row on see some key of the tile, from full_row on every key.
    some_row = begin
    full_row = begin
    if shape.CAUSAL:
        diagonal = length - seqlen_q
        begin = tl.minimum(tl.maximum(first - diagonal, 0), seqlen_q)
        last_end = tl.minimum(last + num_recent - diagonal, seqlen_q)
        last_end = tl.where(num_recent == 0, begin, tl.maximum(last_end, begin))
        end = tl.where(first < num_sink, seqlen_q, last_end)
        behind = num_recent - diagonal
        some_row = tl.maximum(tl.maximum(first, num_sink) + behind, 0) // shape.BLOCK_Q
        full_row = tl.cdiv(tl.maximum(first + BLOCK_N - 1 + behind, 0), shape.BLOCK_Q)
    some_row = tl.where(last < num_sink, sizes.list_rows, some_row)
    m_cut = (first < num_sink) | (first + BLOCK_N > length)
    full_row = tl.where(m_cut, sizes.list_rows, full_row)

    i_head = i_b * sizes.list_heads + tl.minimum(i_h, sizes.list_heads - 1)
    o_rows = i_head * sizes.list_rows * sizes.entries
    p_rows = lists.rows + o_rows
    o_part = tl.arange(0, 2)
    p_offset = lists.offsets + i_head * (wide + 1) + first // WIDTH + tl.zeros_like(o_part)
    b_first = tl.load(p_offset)
    b_last = tl.load(p_offset + 1)
    b_row = tl.where(o_part == 0, some_row, full_row)
    if first_row is not None:
        end_row = first_row + tl.cdiv(seqlen_q, shape.BLOCK_Q)
        b_last = lower_bound(p_rows, b_first, b_last, end_row, halvings)
        b_row = tl.minimum(first_row + b_row, end_row)
    b_at = lower_bound(p_rows, b_first, b_last, b_row, halvings)
    some_at = tl.sum(tl.where(o_part == 0, b_at, 0), 0)
    full_at = tl.maximum(tl.sum(tl.where(o_part == 1, b_at, 0), 0), some_at)
    last_at = tl.sum(tl.where(o_part == 0, b_last, 0), 0)

    ends = tl.where(first < length, (end - begin) * shape.GROUP, 0)
    listed = tl.cdiv(ends, shape.BLOCK_M) * shape.BLOCK_M
    total = tl.where(first < length, listed + (last_at - some_at) * ROWS, 0)
    full = total
    p_bits = None
    if lists.bits is None:
        full = tl.cdiv((full_at - some_at) * ROWS, shape.BLOCK_M) * shape.BLOCK_M
        full = tl.minimum(listed + full, total)
    else:
        p_bits = lists.bits + o_rows + some_at
    return QueryWalk(
        p_rows + some_at, p_bits, first_row, begin, ends, listed, full, total, num_sink,
        num_recent, seqlen_q, length,
    )  # fmt: skip


@triton.jit
def find_listed_queries(walk, o_u, shape):
    """Queries of rows o_u, walk.end for rows without a query, and list bits per block if a tile has
    several blocks."""
    m_list = (o_u >= walk.listed) & (o_u < walk.total)
    o_query = tl.where(m_list, o_u - walk.listed, o_u) // shape.GROUP
    o_entry = o_query // shape.BLOCK_Q
    b_row = tl.load(walk.p_rows + o_entry, mask=m_list, other=0)
    b_bits = b_row
    if walk.first_row is not None:
        b_row -= walk.first_row
    if walk.p_bits is not None:
        b_bits = tl.load(walk.p_bits + o_entry, mask=m_list, other=0)
    o_i = tl.where(m_list, b_row * shape.BLOCK_Q + o_query % shape.BLOCK_Q, walk.begin + o_query)
    m_i = (m_list | (o_u < walk.ends)) & (o_i < walk.end)
    return tl.where(m_i, o_i, walk.end), b_bits


@triton.jit
def seen_by(walk, ends, o_i, o_j, CAUSAL: tl.constexpr):
    """Visibility of keys to queries, except for list bits. ends: rows that see them as sink or
    recent keys."""
    b_end = ends_of(o_i, walk.length, walk.end, CAUSAL)
    b_end = tl.where(ends, b_end, b_end - walk.num_recent)[None, :]
    m_recent = ((o_j + walk.num_recent)[:, None] >= b_end) & ends
    m_seen = m_recent | ((o_j < walk.num_sink) == ends)[:, None]
    return m_seen & (o_j[:, None] < b_end)
