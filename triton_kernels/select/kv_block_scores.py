"""kv_block_scores: a program owns score rows and whole key blocks, and loops over the reduced
dimensions: tokens of a block, queries of a row, heads of a GQA group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill.select.block_pool_keys import SPEC as POOL
from tokenmill.select.rules import rows_of_request

from ..common import INF, Rows, dot, launch
from ..dense.kv_cache import held, numbers, scale_of, scaled
from .block_pool_keys import block_pool_keys
from .keys import KEY_SIZES, KeyRows, key_sizes, length_of, load_keys, load_scales, moved

BLOCK_M = 16  # score rows per program
TILE_ROWS = 64  # keys per product
PIECE_BYTES = 128  # bytes of a row per step
REGISTERS = 200  # by default ptxas takes 128 and spills
VOTE_TILE = 512


class Seen(NamedTuple):
    """Parameters that decide which tokens a query sees."""

    queries: Any
    block_q: Any
    row_tokens: Any
    num_sink: Any
    num_recent: Any


SEEN = ["queries", "block_q", "row_tokens", "num_sink", "num_recent"]
SIZES = [
    "pieces",
    "out_batch",
    "rows",
    "blocks",
    "block_rows",
    "row_queries",
    "heads",
    "m_tiles",
    "n_tiles",
]


@triton.jit
def either_max(a, b):
    """Maximum that propagates NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def last_query(seen, o_row):
    return tl.minimum((o_row + 1) * seen.block_q, seen.queries) - 1


@triton.jit
def seen_end(seen, length, o_query, CAUSAL: tl.constexpr):
    """Number of key rows visible to a query, 0 if only sink keys are."""
    end = length - seen.num_recent
    if CAUSAL:
        end = end + o_query - seen.queries + 1
    else:
        end = end + o_query * 0
    return tl.where(end > seen.num_sink, (end + seen.row_tokens - 1) // seen.row_tokens, 0)


@triton.jit
def load_queries(q, i_b, o_h, o_i, m_i, o_d, m_d):
    o_q = i_b * q.batch + o_i.to(tl.int64) * q.seq + o_h.to(tl.int64) * q.head
    return tl.load(
        q.data + o_q[:, None] + o_d[None, :], mask=m_i[:, None] & m_d[None, :], other=0.0
    )


@triton.jit
def tile_scores(q, keys, k_half, k_scale, pieces, i_b, i_kh, o_h, o_i, m_i, o_t, m_t, scale,
                BOXES: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Scores z of a tile, and a mask of empty boxes. A key row, or the low and high row of a box,
    is loaded in pieces of BLOCK_D columns."""
    of_half: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    b_z = tl.zeros([o_i.shape[0], o_t.shape[0]], tl.float32)
    for piece in range(pieces):
        o_d = piece % of_half * BLOCK_D + tl.arange(0, BLOCK_D)
        half = piece // of_half
        b_q = load_queries(q, i_b, o_h, o_i, m_i, o_d, o_d < DIM)
        b_k, _ = load_keys(moved(keys, half * k_half), i_b, i_kh, o_t, m_t, o_d, o_d < DIM)
        if BOXES:
            b_x = b_q.to(tl.float32)
            m_other = tl.where(half == 0, b_x, -b_x) > 0
            b_q = tl.where(m_other, tl.zeros_like(b_q), b_q)
        # S = Q K^T; box: positive elements of q meet the high row, others the low row
        b_z += dot(b_q, tl.trans(numbers(b_k, b_q.dtype)))
    if k_scale is not None:
        b_z = scaled(b_z, load_scales(k_scale, keys, i_b, i_kh, o_t, m_t))
    m_empty = tl.zeros(o_t.shape, tl.int1)
    if BOXES:
        o_0 = tl.arange(0, 1)
        b_low, m_there = load_keys(keys, i_b, i_kh, o_t, m_t, o_0, o_0 < 1)
        b_high, _ = load_keys(moved(keys, k_half), i_b, i_kh, o_t, m_t, o_0, o_0 < 1)
        m_above = b_low.to(tl.float32) > b_high.to(tl.float32)
        m_empty = m_there & (tl.sum(m_above.to(tl.int32), 1) > 0)
    return b_z * scale, m_empty


@triton.jit(do_not_specialize=[*SIZES, *SEEN, *KEY_SIZES])
def score_kernel(
    q, k, table, key_count, table_stride, page_size, pages, queries, block_q, row_tokens, num_sink,
    num_recent, lengths, out, k_half, k_scale, pieces, scale, out_batch, rows, blocks, block_rows,
    row_queries, heads, m_tiles, n_tiles,
    GROUP: tl.constexpr, GROUPED: tl.constexpr, MEAN: tl.constexpr, MEAN_QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr, BOXES: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N key blocks, BLOCK_T rows of each per step. Score row m is row m // GROUP of
    head m % GROUP, or row m of all heads if GROUPED."""
    keys = KeyRows(k.data, k.batch, k.seq, k.head, key_count, table, table_stride, page_size, pages)
    seen = Seen(queries, block_q, row_tokens, num_sink, num_recent)
    i = tl.program_id(0)
    i_n = i % n_tiles
    i_m = i // n_tiles % m_tiles
    i_kh = i // (n_tiles * m_tiles) % heads
    i_b = (i // (n_tiles * m_tiles * heads)).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = o_m if GROUPED else o_m // GROUP
    m_row = o_row < rows
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_bt = tl.arange(0, BLOCK_N * BLOCK_T)
    o_block = (i_n * BLOCK_N + o_bt // BLOCK_T).to(tl.int64)
    length = length_of(lengths, i_b, keys.rows * seen.row_tokens)
    begin = seen.num_sink // seen.row_tokens
    last = tl.minimum((i_m + 1) * BLOCK_M, rows * (1 if GROUPED else GROUP)) - 1
    last_row = last if GROUPED else last // GROUP
    end = seen_end(seen, length, last_query(seen, last_row), CAUSAL)

    b_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_g in range(GROUP if GROUPED else 1):
        o_h = i_kh * GROUP + (o_m * 0 + i_g if GROUPED else o_m % GROUP)
        b_max = tl.full([BLOCK_M, BLOCK_N], -INF, tl.float32)
        for i_q in range(row_queries):
            if MEAN_QUERIES:
                o_i = o_row
                o_query = last_query(seen, o_row)
            else:
                o_i = o_row * seen.block_q + i_q
                o_query = o_i
            m_i = m_row & (o_query < seen.queries)
            o_end = seen_end(seen, length, o_query, CAUSAL)
            for t in range(0, block_rows, BLOCK_T):
                o_in = t + o_bt % BLOCK_T
                o_t = o_block * block_rows + o_in
                m_t = (o_in < block_rows) & (o_t < end) & (o_t >= begin)
                b_z, m_empty = tile_scores(q, keys, k_half, k_scale, pieces, i_b, i_kh, o_h, o_i,
                                           m_i, o_t, m_t, scale, BOXES, DIM, BLOCK_D)  # fmt: skip
                m_z = (m_t & ~m_empty)[None, :] & (o_t[None, :] < o_end[:, None])
                b_z = tl.where(m_z & m_i[:, None], b_z, -INF)
                if BLOCK_T > 1:
                    b_z = tl.reshape(b_z, [BLOCK_M, BLOCK_N, BLOCK_T])
                    b_bad = tl.max((b_z != b_z).to(tl.int32), 2)
                    b_z = tl.max(tl.where(b_z == b_z, b_z, -INF), 2)
                    b_z = tl.where(b_bad > 0, float("nan"), b_z)
                b_max = either_max(b_max, b_z)
        if MEAN:
            b_total += b_max
        elif GROUPED:
            b_total = either_max(b_total, b_max) if i_g > 0 else b_max
        else:
            b_total = b_max
    if MEAN:
        b_total = tl.div_rn(b_total, tl.zeros_like(b_total) + GROUP)
    o_head = i_kh + o_m * 0 if GROUPED else i_kh * GROUP + o_m % GROUP
    o_out = i_b * out_batch + (o_head.to(tl.int64) * rows + o_row) * blocks
    m_out = m_row[:, None] & (o_n < blocks)[None, :]
    tl.store(out + o_out[:, None] + o_n[None, :], b_total, mask=m_out)


@triton.jit(
    do_not_specialize=["key_count", *SEEN, "rows", "blocks", "block_rows", "heads", "n_tiles"]
)
def vote_kernel(
    scores, lse, key_count, queries, block_q, row_tokens, num_sink, num_recent, lengths, out, rows,
    blocks, block_rows, heads, n_tiles,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    seen = Seen(queries, block_q, row_tokens, num_sink, num_recent)
    i = tl.program_id(0)
    i_row = i // n_tiles % rows
    i_b = (i // (n_tiles * rows)).to(tl.int64)
    o_n = (i % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    b_vote = tl.zeros([BLOCK_N], tl.float32)
    for h in range(heads):
        i_z = (i_b * heads + h) * rows + i_row
        b_z = tl.load(scores + i_z * blocks + o_n, mask=o_n < blocks, other=-INF)
        # vote = sum over heads of exp(z - lse)
        b_vote += tl.exp(b_z - tl.load(lse + i_z))
    length = length_of(lengths, i_b, key_count * seen.row_tokens)
    begin = seen.num_sink // seen.row_tokens
    end = seen_end(seen, length, last_query(seen, i_row), CAUSAL)
    m_seen = tl.maximum(o_n * block_rows, begin) < tl.minimum((o_n + 1) * block_rows, end)
    p_out = out + (i_b * rows + i_row) * blocks + o_n
    tl.store(p_out, tl.where(m_seen, b_vote, -INF), mask=o_n < blocks)


def kv_block_scores(a: Any) -> Tensor:
    batch, queries, heads, dim = a.q.shape
    kv_heads = a.k.shape[2]
    sizes = key_sizes(a.k, a.block_table)
    key_count = rows_of_request(a.k, a.block_table)
    row_tokens, block_rows = (1, a.block_k) if a.scoring == "max_block" else (a.block_k, 1)
    block_rows = min(block_rows, max(key_count, 1))
    block_q = min(a.block_q, max(queries, 1))
    rows, blocks = triton.cdiv(queries, block_q), triton.cdiv(key_count, block_rows)
    grouped, votes = a.head_reduce.startswith("group"), a.head_reduce == "softmax_vote"
    mean, boxes = a.q_reduce == "mean", a.scoring == "minmax"
    seen = Seen(queries, block_q, row_tokens, a.num_sink, a.num_recent)
    q = block_pool_keys(POOL.record(a.q, block_q)) if mean else a.q
    group = heads // max(kv_heads, 1)
    z = q.new_empty((batch, kv_heads if grouped else heads, rows, blocks), dtype=torch.float32)
    if heads == 0 and not votes:  # no query heads score the keys
        return z.fill_(-torch.inf)
    block_d = min(max(triton.next_power_of_2(dim), 16), PIECE_BYTES // q.element_size())
    pieces = triton.cdiv(dim, block_d) * (2 if boxes else 1)
    block_t = min(triton.next_power_of_2(block_rows), TILE_ROWS)
    block_n = TILE_ROWS // block_t
    n_tiles = triton.cdiv(blocks, block_n)
    m_tiles = triton.cdiv(rows * (1 if grouped else group), BLOCK_M)
    launch(
        score_kernel, batch * kv_heads * m_tiles * n_tiles, q, Rows(q, *q.stride()[:3]),
        Rows(held(a.k), *a.k.stride()[:3]), a.block_table, *sizes, *seen, a.seqlens_k, z,
        a.k.stride(3) if boxes else 0, scale_of(a.k_scale), pieces, a.scale, z.stride(0), rows,
        blocks, block_rows, 1 if mean else block_q, kv_heads, m_tiles, n_tiles, GROUP=group,
        GROUPED=grouped, MEAN=a.head_reduce == "group_mean", MEAN_QUERIES=mean, CAUSAL=a.causal,
        BOXES=boxes, DIM=dim, BLOCK_M=BLOCK_M, BLOCK_N=block_n, BLOCK_T=block_t, BLOCK_D=block_d,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    if not votes:
        return z
    out = q.new_empty((batch, 1, rows, blocks), dtype=torch.float32)
    if out.numel() == 0:
        return out
    lse = torch.where(z.isnan(), -torch.inf, z).logsumexp(3)
    n_tiles = triton.cdiv(blocks, VOTE_TILE)
    launch(
        vote_kernel, batch * rows * n_tiles, q, z, lse, key_count, *seen, a.seqlens_k, out, rows,
        blocks, block_rows, heads, n_tiles, CAUSAL=a.causal, BLOCK_N=VOTE_TILE, num_warps=4,
    )  # fmt: skip
    return out
