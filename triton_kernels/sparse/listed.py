"""Attention to listed keys and its gradients: the body of a program that owns a tile of queries or
of keys, for both kinds of lists (`blocks` of a sequence, `regions` of a map).
A query tile streams over the keys of its list, gathered into full tiles; a key tile over the
queries whose lists hold it. dz = P (dP - delta), delta = rowsum(dO O) - dlse. Scores are in bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    INF,
    INTERPRETED,
    STEP,
    STEP_COLUMNS,
    X_BITS,
    X_MASK,
    architecture,
    dot,
    load_rows,
    load_tile,
    row_pointers,
    rows_of_nan,
    scores,
    slice_of,
    store_tile,
)
from ..dense.attention import PLANS, Plan, Tiles, plan_of, tile_options
from ..dense.attention_backward import gradients, load_lse, through_softcap
from ..dense.attention_forward import accumulate, accumulate_seen, no_sums, normaliser
from .blocks import NOWHERE, Shape, find_listed_keys, find_listed_queries, seen_by, seen_in_front
from .regions import find_pixel_keys, find_pixel_queries
from .transpose_block_list import Lists, compacted

# Smaller tiles than dense attention: key addressing takes registers.
SPARSE_PLANS = PLANS | {
    (2, 64): Plan(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 2)),
    (2, 128): Plan(Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
    (4, 128): PLANS[4, 128]._replace(forward=Tiles(16, 16, 4, 2)),
}
# For 9.0 and 10.x, whose 64-row MMA wants four warps.
LARGE_SPARSE_PLANS = SPARSE_PLANS | {
    (2, 128): Plan(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2)),
}
Plans = dict[tuple[int, int], Plan]


class Statistics(NamedTuple):
    """Layout of row statistics [B, heads, rows]; the rows of a map are in lines of width pixels."""

    heads: Any
    rows: Any
    width: Any = None


class KeyTile(NamedTuple):
    o_j: Any
    b_bit: Any  # block within the tile


@triton.jit
def statistics_at(statistics, i_b, o_i, o_h):
    o_row = o_i
    if statistics.width is not None:
        o_row = (o_i >> X_BITS) * statistics.width + (o_i & X_MASK)
    return (i_b * statistics.heads + o_h) * statistics.rows + o_row


@triton.jit
def find_keys(walk, o_t, shape):
    """Positions of keys o_t, NOWHERE if no query of the tile sees the key."""
    if walk.grid is not None:
        o_j = find_pixel_keys(walk, o_t)
    else:
        o_j = find_listed_keys(walk, o_t, shape.BLOCK_K)
    return o_j


@triton.jit
def find_queries(walk, o_u, shape):
    """Positions of rows o_u, walk.end for rows without a query, and list bits per block if a key
    tile has several blocks."""
    if walk.grid is not None:
        o_i, b_bits = find_pixel_queries(walk, o_u, shape.GROUP)
    else:
        o_i, b_bits = find_listed_queries(walk, o_u, shape)
    return o_i, b_bits


@triton.jit
def seen(walk, t, o_t, o_j, b_end, CAUSAL: tl.constexpr):
    if CAUSAL:
        m_seen = seen_in_front(walk, t, o_t, o_j, b_end)
    else:
        m_seen = (o_j != NOWHERE)[None, :]
    return m_seen


class Pages(NamedTuple):
    """Page table of a request: key j is row j % size of page table[j // size]."""

    table: Any
    count: Any
    size: Any


@triton.jit
def pages_of(table, stride, count, size, i_b):
    pages = None
    if table is not None:
        pages = Pages(table + i_b * stride, count, size)
    return pages


@triton.jit
def load_keys(rows, page_stride, pages, o_j, DIM: tl.constexpr, BLOCK: tl.constexpr, first_col=0):
    """[keys, BLOCK] tile; rows beyond the keys and columns beyond DIM are 0. A missing page is read
    as page 0."""
    if pages is None:
        b_x = load_rows(rows, o_j, DIM, BLOCK, first_col)
    else:
        m_j = o_j < rows.length
        b_page = tl.load(pages.table + o_j // pages.size, mask=m_j, other=0)
        b_page = tl.where((b_page < 0) | (b_page >= pages.count), 0, b_page).to(tl.int64)
        o_row = (o_j % pages.size).to(tl.int64)
        p_row = rows.data + b_page * page_stride + o_row * rows.seq
        b_x = load_tile(p_row, m_j, DIM, BLOCK, first_col)
    return b_x


@triton.jit
def attend(q, k, v, out, lse, statistics, tile, walk, pages, b_sink, terms, head, i_b, i_kv, shape):
    """out and lse of a tile of queries. pages: page table of the keys, or None."""
    keys = slice_of(k, i_b, i_kv, 0, walk.end)
    values = slice_of(v, i_b, i_kv, 0, walk.end)
    if pages is not None:
        keys = slice_of(k, 0, i_kv, 0, walk.end)
        values = slice_of(v, 0, i_kv, 0, walk.end)
    p_q = row_pointers(q, i_b, tile.o_i, tile.o_h)
    b_q = load_tile(p_q, tile.m_row, shape.HEAD_DIM, shape.BLOCK_D)

    sums = no_sums(shape.BLOCK_M, shape.BLOCK_V)
    parts = (0, walk.full, walk.total)
    # Prefetch one step ahead: a key's address comes from one load, the key from another.
    o_j = find_keys(walk, tl.arange(0, shape.BLOCK_N), shape)
    for PART in tl.static_range(2):
        for t in range(parts[PART], parts[PART + 1], shape.BLOCK_N):
            o_t = t + tl.arange(0, shape.BLOCK_N)
            b_k = load_keys(keys, k.batch, pages, o_j, shape.HEAD_DIM, shape.BLOCK_D)
            b_v = load_keys(values, v.batch, pages, o_j, shape.VALUE_DIM, shape.BLOCK_V)
            # S = Q K^T
            b_qk = dot(b_q, tl.trans(b_k))
            b_z = scores(b_qk, tile.o_i[:, None], o_j[None, :], terms, head, None)
            if PART == 1:
                b_z = tl.where(seen(walk, t, o_t, o_j, tile.b_end, shape.CAUSAL), b_z, -INF)
            # online softmax, O += P V
            sums = accumulate(sums, b_z, b_v, head)
            o_j = find_keys(walk, o_t + shape.BLOCK_N, shape)

    b_factor, b_lse = normaliser(sums.top, sums.sum, b_sink, head)
    o_row = statistics_at(statistics, i_b, tile.o_i, tile.o_h)
    tl.store(lse + o_row, b_lse, mask=tile.m_row)
    # O = O / row_sum
    p_out = row_pointers(out, i_b, tile.o_i, tile.o_h)
    store_tile(p_out, tile.m_row, sums.acc * b_factor[:, None], shape.VALUE_DIM)

    # recompute rows that are NaN because a masked value is not finite
    if shape.CAUSAL:
        m_again = rows_of_nan(sums.acc) & tile.m_row
        if tl.max(m_again.to(tl.int32), 0) != 0:
            COLUMNS: tl.constexpr = min(shape.BLOCK_V, STEP_COLUMNS)
            for c in tl.range(0, shape.VALUE_DIM, COLUMNS, num_stages=1):
                b_y = tl.zeros([shape.BLOCK_M, COLUMNS], tl.float32)
                b_y_lost = tl.zeros([shape.BLOCK_M, COLUMNS], tl.float32)
                for t in tl.range(0, walk.total, STEP, num_stages=1):
                    o_u = t + tl.arange(0, STEP)
                    o_k = find_keys(walk, o_u, shape)
                    b_k = load_keys(keys, k.batch, pages, o_k, shape.HEAD_DIM, shape.BLOCK_D)
                    b_v = load_keys(values, v.batch, pages, o_k, shape.VALUE_DIM, COLUMNS, c)
                    b_qk = dot(b_q, tl.trans(b_k))
                    b_z = scores(b_qk, tile.o_i[:, None], o_k[None, :], terms, head, None)
                    b_z = tl.where(seen(walk, t, o_u, o_k, tile.b_end, shape.CAUSAL), b_z, -INF)
                    b_y, b_y_lost = accumulate_seen(b_z, b_v, b_y, b_y_lost, sums.top, head)
                store_tile(p_out, m_again, b_y * b_factor[:, None], shape.VALUE_DIM, c)


@triton.jit
def query_gradients(
    dout, dlse, out, lse, delta, q, k, v, dq, statistics, tile, walk, terms, head, i_b, i_kv, shape
):
    """dq and delta of a tile of queries."""
    keys = slice_of(k, i_b, i_kv, 0, walk.end)
    values = slice_of(v, i_b, i_kv, 0, walk.end)
    p_q = row_pointers(q, i_b, tile.o_i, tile.o_h)
    b_q = load_tile(p_q, tile.m_row, shape.HEAD_DIM, shape.BLOCK_D)
    p_dout = row_pointers(dout, i_b, tile.o_i, tile.o_h)
    b_dout = load_tile(p_dout, tile.m_row, shape.VALUE_DIM, shape.BLOCK_V)
    p_out = row_pointers(out, i_b, tile.o_i, tile.o_h)
    b_out = load_tile(p_out, tile.m_row, shape.VALUE_DIM, shape.BLOCK_V)
    o_row = statistics_at(statistics, i_b, tile.o_i, tile.o_h)
    # delta = rowsum(dO O) - dlse
    b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + o_row, mask=tile.m_row, other=0.0)
    tl.store(delta + o_row, b_delta, mask=tile.m_row)
    b_lse = load_lse(lse + o_row, tile.m_row, head)

    b_dq = tl.zeros([shape.BLOCK_M, shape.BLOCK_D], tl.float32)
    parts = (0, walk.full, walk.total)
    o_j = find_keys(walk, tl.arange(0, shape.BLOCK_N), shape)
    for PART in tl.static_range(2):
        for t in range(parts[PART], parts[PART + 1], shape.BLOCK_N):
            o_t = t + tl.arange(0, shape.BLOCK_N)
            b_k = load_rows(keys, o_j, shape.HEAD_DIM, shape.BLOCK_D)
            b_v = load_rows(values, o_j, shape.VALUE_DIM, shape.BLOCK_V)
            # S = Q K^T, dP = dO V^T
            b_qk = dot(b_q, tl.trans(b_k))
            b_dp = dot(b_dout, tl.trans(b_v))
            m_seen = None
            if PART == 1:
                m_seen = seen(walk, t, o_t, o_j, tile.b_end, shape.CAUSAL)
            _, b_dz = gradients(
                b_qk, b_dp, tile.o_i[:, None], o_j[None, :], b_lse[:, None], b_delta[:, None],
                terms, head, None, m_seen,
            )  # fmt: skip
            # dQ += dz K
            b_dq += dot(through_softcap(b_dz, b_qk, terms), b_k)
            o_j = find_keys(walk, o_t + shape.BLOCK_N, shape)

    p_dq = row_pointers(dq, i_b, tile.o_i, tile.o_h)
    store_tile(p_dq, tile.m_row, b_dq * terms.scale, shape.HEAD_DIM)


@triton.jit
def add_key_gradients(
    b_dk, b_dv, b_k, b_v, dout, lse, delta, q, statistics, tile, walk, terms, head, i_b, i_h, shape
):
    """Adds dk and dv of a tile of keys, from queries of the heads that share a list. Scores are
    transposed: P^T and dz^T are left operands of the next products."""
    parts = (0, walk.full, walk.total)
    # Prefetch one step ahead: a query's address comes from one load, the query from others.
    o_i, b_bits = find_queries(walk, tl.arange(0, shape.BLOCK_M), shape)
    # With bits every tile is masked; without bits, no tile of a map is.
    FIRST: tl.constexpr = 1 if walk.grid is not None and walk.p_bits is None else 0
    for PART in tl.static_range(FIRST, 2 if walk.p_bits is None else 1):
        for u in range(parts[PART], parts[PART + 1], shape.BLOCK_M):
            o_u = u + tl.arange(0, shape.BLOCK_M)
            ends = u < walk.listed
            o_h = i_h * shape.GROUP + (o_u - tl.where(ends, 0, walk.listed)) % shape.GROUP
            m_i = o_i < walk.end
            p_q = row_pointers(q, i_b, o_i, o_h)
            p_dout = row_pointers(dout, i_b, o_i, o_h)
            b_q = load_tile(p_q, m_i, shape.HEAD_DIM, shape.BLOCK_D)
            b_dout = load_tile(p_dout, m_i, shape.VALUE_DIM, shape.BLOCK_V)
            o_row = statistics_at(statistics, i_b, o_i, o_h)
            b_lse = load_lse(lse + o_row, m_i, head)
            b_delta = tl.load(delta + o_row, mask=m_i, other=0.0)
            # S^T = K Q^T, dP^T = V dO^T
            b_qk = dot(b_k, tl.trans(b_q))
            b_dp = dot(b_v, tl.trans(b_dout))
            m_seen = None
            if PART == 0:
                if walk.grid is None:
                    m_seen = seen_by(walk, ends, o_i, tile.o_j, shape.CAUSAL)
                if walk.p_bits is not None:
                    b_own = tl.where(ends, -1, b_bits)
                    m_bit = ((b_own[None, :] >> tile.b_bit[:, None]) & 1) != 0
                    m_seen = m_bit if m_seen is None else m_seen & m_bit
            b_p, b_dz = gradients(
                b_qk, b_dp, o_i[None, :], tile.o_j[:, None], b_lse[None, :], b_delta[None, :],
                terms, head, None, m_seen,
            )  # fmt: skip
            # dV += P^T dO, dK += dz^T Q
            b_dv += dot(b_p, b_dout)
            b_dk += dot(through_softcap(b_dz, b_qk, terms), b_q)
            o_i, b_bits = find_queries(walk, o_u + shape.BLOCK_M, shape)
    return b_dk, b_dv


class Listed(NamedTuple):
    """Sizes and lists of a call, as the launchers need them."""

    q: Tensor  # [B, S, H, D] or [B, Y, X, H, D]
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor
    queries: int  # queries per list
    keys: int  # keys per block
    blocks: int
    softcap: float = 0.0
    more_keys: int = 0  # visible keys in addition to the listed ones

    @property
    def kv_heads(self) -> int:
        return self.k.shape[-2]

    @property
    def row_heads(self) -> int:
        """Number of heads with separate rows of queries: KV heads, or query heads if each has its
        own list."""
        one_list_each = self.indices.shape[1] > self.kv_heads
        return self.q.shape[-2] if one_list_each else self.kv_heads

    @property
    def group(self) -> int:
        return self.q.shape[-2] // self.row_heads

    @property
    def shared(self) -> int:
        return self.row_heads // self.kv_heads

    def plan(self, plans: Plans = SPARSE_PLANS, large_plans: Plans = LARGE_SPARSE_PLANS) -> Plan:
        """Tiles with no more queries than share a list. Small key blocks are combined into tiles of
        32 keys: in wider tiles, a query that lists few of the blocks would still multiply all of
        them."""
        if INTERPRETED.value:  # a tile costs milliseconds whatever its size
            keys = self.more_keys + self.indices.shape[3] * self.keys
            n = min(max(triton.next_power_of_2(keys) // 16, 32), 1024)
            plan = Plan(*[Tiles(64, n, 4, 1)] * 3)
        else:
            fitting = large_plans if 90 <= architecture(self.q) < 120 else plans
            plan = plan_of(fitting, self.q, self.v.shape[-1], self.softcap != 0.0)
        maximum = max(triton.next_power_of_2(self.queries * self.group), 16)
        forward, queries = (
            t if maximum >= t.block_m else t._replace(block_m=maximum, num_warps=4)
            for t in plan[:2]
        )
        width = max(triton.next_power_of_2(self.keys), 32)
        keys_plan = plan.keys._replace(block_n=min(plan.keys.block_n, width))
        return Plan(forward, queries, keys_plan)

    def query_tiles(self, tiles: Tiles) -> int:
        """Query tiles per list."""
        return triton.cdiv(self.queries * self.group, tiles.block_m)

    def programs(self, tiles: Tiles) -> int:
        lists = self.indices.shape[0] * self.row_heads * self.indices.shape[2]
        return lists * self.query_tiles(tiles)

    def factor(self, tiles: Tiles) -> int:
        """Blocks per key tile, a power of two; 1 also if a block spans several tiles."""
        return 1 << max(tiles.block_n // self.keys, 1).bit_length() - 1

    def compacted(self, factor: int = 1) -> Lists:
        return compacted(self.indices, self.counts, self.blocks, factor)

    def options(
        self, tiles: Tiles, causal: bool = False, block_q: int = 1, block_k: int = 1
    ) -> dict[str, Any]:
        """Compile-time choices and launch options of a kernel."""
        options = tile_options(tiles, self.q.shape[-1], self.v.shape[-1])
        choices = {name: options.pop(name) for name in Shape._fields if name in options}
        choices |= {"GROUP": self.group, "CAUSAL": causal, "BLOCK_Q": block_q, "BLOCK_K": block_k}
        shape = Shape(**{name: tl.constexpr(choice) for name, choice in choices.items()})
        return {"shape": shape, **options}
