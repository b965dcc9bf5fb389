"""block_sparse_attention: one program owns a tile of the queries that share a list and streams past
them the keys of the list, gathered into full tiles between the first and the last keys.

Row m of a tile is query m // group of head m % group: the query heads that share list and keys lie
together. Scores are in bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    FAR,
    INF,
    INTERPRETED,
    Sequence,
    architecture,
    dot,
    head_of,
    launch,
    load_rows,
    load_tile,
    lower_bound,
    program,
    row_pointers,
    scores,
    slice_of,
    store_tile,
    terms_of,
)
from ..dense.attention import PLANS, Plan, Tiles, plan_of, tile_options
from ..dense.attention_decode import rows_of
from ..dense.attention_forward import accumulate, normaliser
from .transpose_list import compacted

# As those of attention: where keys lie takes registers.
SPARSE_PLANS = PLANS | {
    (2, 64): Plan(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 4, 2)),
    (2, 128): Plan(Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
    (4, 128): PLANS[4, 128]._replace(forward=Tiles(16, 16, 4, 2)),
}
# Of 9.0 and 10.x, whose products of 64 rows want four warps.
LARGE_SPARSE_PLANS = SPARSE_PLANS | {
    (2, 128): Plan(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2)),
}
NOWHERE = tl.constexpr(FAR)  # for a position
# By which no kernel is specialised: a new length compiles nothing.
SIZES = ["list_heads", "list_rows", "entries", "halvings", "num_sink", "num_recent", "seqlen_q"]
SIZES += ["seqlen_k", "row_heads", "shared", "tiles", "wide"]


class QueryTile(NamedTuple):
    """Query i sees keys in front of its end."""

    o_i: Any
    o_h: Any
    m_row: Any
    b_end: Any
    first: Any  # query
    first_end: Any  # of the first query
    last_end: Any  # of the last one


class KeyWalk(NamedTuple):
    """Keys that a tile of queries sees, numbered: first ones, listed ones, last ones."""

    p_ids: Any
    sinks: Any  # first keys; the list begins here
    list_end: Any
    recent: Any  # the last keys begin here: whole tiles
    total: Any
    full: Any  # all queries see the keys in front of it: whole tiles
    listed_end: Any  # position behind what any query sees through the list
    recent_begin: Any  # position of the first of the last keys


@triton.jit
def length_of(lengths, seqlen_k, i_b):
    length = seqlen_k
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + i_b), 0), seqlen_k)
    return length


@triton.jit
def ends_of(o_i, length, seqlen_q, CAUSAL: tl.constexpr):
    o_end = o_i - o_i + length
    if CAUSAL:
        o_end += o_i + 1 - seqlen_q
    return o_end


@triton.jit
def query_tile(
    i_r, i_tile, i_h, length, seqlen_q,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    o_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_i = i_r * BLOCK_Q + o_row // GROUP
    m_row = (o_row < BLOCK_Q * GROUP) & (o_i < seqlen_q)
    o_h = i_h * GROUP + o_row % GROUP
    first = i_r * BLOCK_Q + i_tile * BLOCK_M // GROUP
    last = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, BLOCK_Q - 1)
    last = tl.minimum(i_r * BLOCK_Q + last, seqlen_q - 1)
    first_end = tl.maximum(ends_of(first, length, seqlen_q, CAUSAL), 0)
    last_end = tl.maximum(ends_of(last, length, seqlen_q, CAUSAL), 0)
    b_end = ends_of(o_i, length, seqlen_q, CAUSAL)
    return QueryTile(o_i, o_h, m_row, b_end, first, first_end, last_end)


@triton.jit
def key_walk(
    ids, counts, list_heads, list_rows, entries, halvings, num_sink, num_recent, i_b, i_list, i_r,
    tile, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_row = (i_b * list_heads + i_list) * list_rows + i_r
    p_ids = ids + i_row * entries
    first_listed = tl.maximum(tile.first_end - num_recent, 0)
    last_listed = tl.maximum(tile.last_end - num_recent, 0)
    o_part = tl.arange(0, 4)
    b_least = tl.where(o_part == 0, num_sink // BLOCK_K, tl.cdiv(num_sink, BLOCK_K))
    b_least = tl.where(o_part == 2, first_listed // BLOCK_K, b_least)
    b_least = tl.where(o_part == 3, tl.cdiv(last_listed, BLOCK_K), b_least)
    b_begin = tl.zeros([4], tl.int32)
    b_at = lower_bound(p_ids, b_begin, b_begin + tl.load(counts + i_row), b_least, halvings)
    at_sink = tl.sum(tl.where(o_part == 0, b_at, 0), 0)
    first = tl.sum(tl.where(o_part == 1, b_at, 0), 0)
    full = tl.maximum(tl.sum(tl.where(o_part == 2, b_at, 0), 0), first)
    last = tl.maximum(tl.sum(tl.where(o_part == 3, b_at, 0), 0), first)

    # If it is listed, all of the block in which the first keys end is one of them.
    sinks = tl.where(first > at_sink, tl.cdiv(num_sink, BLOCK_K) * BLOCK_K, num_sink)
    sinks = tl.minimum(sinks, tile.last_end)
    list_end = sinks + (last - first) * BLOCK_K
    recent_begin = tl.where(num_recent == 0, tile.last_end, tile.first_end - num_recent)
    recent_begin = tl.minimum(tl.maximum(recent_begin, sinks), tile.last_end)
    recent = tl.cdiv(list_end, BLOCK_N) * BLOCK_N
    full = tl.where(tile.first_end < sinks, 0, sinks + (full - first) * BLOCK_K)
    return KeyWalk(
        p_ids + first,
        sinks,
        list_end,
        recent,
        tl.where(num_recent == 0, list_end, recent + (tile.last_end - recent_begin)),
        full // BLOCK_N * BLOCK_N,
        last_listed,
        recent_begin,
    )


@triton.jit
def find_keys(walk, o_t, BLOCK_K: tl.constexpr):
    """Positions of keys o_t, NOWHERE if no query of the tile sees one."""
    o_listed = o_t - walk.sinks
    m_list = (o_listed >= 0) & (o_t < walk.list_end)
    b_id = tl.load(walk.p_ids + o_listed // BLOCK_K, mask=m_list, other=0)
    o_own = b_id * BLOCK_K + o_listed % BLOCK_K
    o_j = tl.where(o_t < walk.sinks, o_t, NOWHERE)
    o_j = tl.where(m_list & (o_own < walk.listed_end), o_own, o_j)
    m_recent = (o_t >= walk.recent) & (o_t < walk.total)
    return tl.where(m_recent, walk.recent_begin + (o_t - walk.recent), o_j)


@triton.jit
def seen(walk, t, o_t, o_j, b_end, num_recent, CAUSAL: tl.constexpr):
    """Of the tile of keys that begins with key t. Each key once: as one of the first, else through
    the list or as one of the last."""
    if CAUSAL:
        recent = t >= walk.recent
        o_j = tl.where((o_t < walk.sinks) | recent, o_j, o_j + num_recent)
        b_from = tl.where(recent, b_end - num_recent, 0)
        m_seen = (o_j[None, :] < b_end[:, None]) & (o_j[None, :] >= b_from[:, None])
    else:
        m_seen = (o_j != NOWHERE)[None, :]
    return m_seen


@triton.jit(do_not_specialize=SIZES)
def block_sparse_kernel(
    q,
    k,
    v,
    out,
    lse,
    lengths,
    ids,
    counts,
    list_heads,
    list_rows,
    entries,
    halvings,
    num_sink,
    num_recent,
    terms,
    seqlen_q,
    seqlen_k,
    row_heads,
    shared,
    tiles,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_block, i_h, i_b = program(list_rows * tiles, row_heads)
    # The last queries see most keys under a causal mask: longest programs first.
    i_block = list_rows * tiles - 1 - i_block
    i_r = i_block // tiles
    length = length_of(lengths, seqlen_k, i_b)
    tile = query_tile(i_r, i_block % tiles, i_h, length, seqlen_q, GROUP, CAUSAL, BLOCK_Q, BLOCK_M)
    if tile.first >= seqlen_q:
        return
    walk = key_walk(
        ids, counts, list_heads, list_rows, entries, halvings, num_sink, num_recent, i_b,
        tl.minimum(i_h, list_heads - 1), i_r, tile, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    sequence = Sequence(0, seqlen_q, 0, length, length - seqlen_q)
    head = head_of(terms, i_b, i_h, length, False)
    keys = slice_of(k, i_b, i_h // shared, 0, length)
    values = slice_of(v, i_b, i_h // shared, 0, length)
    b_q = load_tile(row_pointers(q, i_b, tile.o_i, tile.o_h), tile.m_row, HEAD_DIM, BLOCK_D)

    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_acc_lost = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_sum_lost = tl.zeros([BLOCK_M], tl.float32)
    b_top = tl.full([BLOCK_M], -INF, tl.float32)
    parts = (0, walk.full, walk.total)
    # A step early: a key is found through a load, and loaded through another.
    o_j = find_keys(walk, tl.arange(0, BLOCK_N), BLOCK_K)
    for PART in tl.static_range(2):
        for t in range(parts[PART], parts[PART + 1], BLOCK_N):
            o_t = t + tl.arange(0, BLOCK_N)
            b_k = load_rows(keys, o_j, HEAD_DIM, BLOCK_D)
            b_v = load_rows(values, o_j, VALUE_DIM, BLOCK_V)
            b_qk = dot(b_q, tl.trans(b_k))
            b_z = scores(b_qk, tile.o_i[:, None], o_j[None, :], terms, head, sequence)
            if PART == 1:
                m_seen = seen(walk, t, o_t, o_j, tile.b_end, num_recent, CAUSAL)
                b_z = tl.where(m_seen, b_z, -INF)
            b_acc, b_acc_lost, b_sum, b_sum_lost, b_top = accumulate(
                b_z, b_v, b_acc, b_acc_lost, b_sum, b_sum_lost, b_top, head, False, False
            )
            o_j = find_keys(walk, o_t + BLOCK_N, BLOCK_K)

    b_factor, b_lse = normaliser(b_top, b_sum, None, i_h, head)
    o_row = (i_b * (row_heads * GROUP) + tile.o_h) * seqlen_q + tile.o_i
    tl.store(lse + o_row, b_lse, mask=tile.m_row)
    p_out = row_pointers(out, i_b, tile.o_i, tile.o_h)
    store_tile(p_out, tile.m_row, b_acc * b_factor[:, None], VALUE_DIM)


class Call(NamedTuple):
    """The lowered list, and what the kernels take from it."""

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    causal: bool
    num_sink: int
    num_recent: int
    scale: float
    softcap: float
    lengths: Tensor | None
    deterministic: bool

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def row_heads(self) -> int:
        """Heads that have queries of their own: those of k, or of q if each has its own list."""
        one_list_each = self.indices.shape[1] > self.kv_heads
        return self.q.shape[2] if one_list_each else self.kv_heads

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.row_heads

    @property
    def key_blocks(self) -> int:
        return triton.cdiv(self.k.shape[1], self.block_k)

    def plan(self) -> Plan:
        """That of attention, with no more queries than share a list."""
        if INTERPRETED.value:  # a tile costs milliseconds whatever its size
            keys = self.num_sink + self.indices.shape[3] * self.block_k + self.num_recent
            n = min(max(triton.next_power_of_2(keys) // 16, 32), 1024)
            plan = Plan(*[Tiles(64, n, 4, 1)] * 3)
        else:
            plans = LARGE_SPARSE_PLANS if 90 <= architecture(self.q) < 120 else SPARSE_PLANS
            plan = plan_of(plans, self.q, self.v.shape[3], self.softcap != 0.0)
        most = max(triton.next_power_of_2(self.block_q * self.group), 16)
        forward, queries = (
            t if most >= t.block_m else t._replace(block_m=most, num_warps=4) for t in plan[:2]
        )
        return Plan(forward, queries, plan.keys)

    def query_tiles(self, tiles: Tiles) -> int:
        """Of a list."""
        return triton.cdiv(self.block_q * self.group, tiles.block_m)

    def programs(self, tiles: Tiles) -> int:
        lists = self.q.shape[0] * self.row_heads * self.indices.shape[2]
        return lists * self.query_tiles(tiles)

    def lists(self) -> tuple[Any, ...]:
        """What kernels take that walk along the lists of queries."""
        lists = compacted(self.indices, self.counts, self.key_blocks)
        heads, rows, entries = self.indices.shape[1:]
        return lists.ids, lists.counts, heads, rows, entries, entries.bit_length()

    def arguments(self) -> tuple[Any, ...]:
        """What every kernel takes, from num_sink to shared."""
        seqlen_k = self.k.shape[1]
        return (
            min(self.num_sink, seqlen_k),
            min(self.num_recent, seqlen_k),
            terms_of(self.scale, self.softcap, 0.0, False, None, None),
            self.q.shape[1],
            seqlen_k,
            self.row_heads,
            self.row_heads // self.kv_heads,
        )

    def options(self, tiles: Tiles) -> dict[str, Any]:
        return {
            "GROUP": self.group,
            "CAUSAL": self.causal,
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            **tile_options(tiles, self.q.shape[3], self.v.shape[3]),
        }


def block_sparse_attention(*lowered: Any) -> tuple[Tensor, Tensor]:
    call = Call(*lowered)
    batch, seqlen_q, heads = call.q.shape[:3]
    out = call.q.new_empty((batch, seqlen_q, heads, call.v.shape[3]))
    lse = call.q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tiles = call.plan().forward
    launch(
        block_sparse_kernel,
        call.programs(tiles),
        call.q,
        *map(rows_of, (call.q, call.k, call.v, out)),
        lse,
        call.lengths,
        *call.lists(),
        *call.arguments(),
        call.query_tiles(tiles),
        **call.options(tiles),
    )
    return out, lse
