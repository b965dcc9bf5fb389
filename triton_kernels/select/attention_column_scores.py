"""Column sums of attention weights: one program owns keys and streams over queries. Without a given
lse, a first kernel computes row_max and row_sum of each query."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    INF,
    INTERPRETED,
    LENGTHS,
    LOG2E,
    Rows,
    Slice,
    dot,
    launch,
    load_rows,
    program,
    slice_of,
)

LOG2_LN2 = tl.constexpr(-0.528766373)
BELOW_ONE = tl.constexpr(0.99999994)  # 1 - 2^-24
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


class Requests(NamedTuple):
    """Per-request sizes, [B] int32, or None: all rows."""

    lengths: Tensor | None
    query_lengths: Tensor | None
    causal: int


class Request(NamedTuple):
    """Queries first_row .. rows - 1 and keys of one request."""

    first_row: Any
    rows: Any
    columns: Any
    diagonal: Any


@triton.jit
def clamped(lengths, i_b, longest):
    length = longest
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + i_b), 0), longest)
    return length


@triton.jit
def request_of(requests, window, tokens_q, tokens_k, i_b):
    rows = clamped(requests.query_lengths, i_b, tokens_q)
    columns = clamped(requests.lengths, i_b, tokens_k)
    return Request(tl.maximum(rows - window, 0), rows, columns, columns - rows)


@triton.jit
def log2(b_x):
    """log2 of positive normal numbers; relative error 2^-22, also near 1, where log2 vanishes."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_e = (b_bits - SQRT_HALF_BITS) >> 23
    b_m = (b_bits - (b_e << 23)).to(tl.float32, bitcast=True)
    b_s = (b_m - 1.0) / (b_m + 1.0)
    b_u = b_s * b_s
    b_p = 0.320598898 * b_u + 0.412198583
    b_p = b_p * b_u + 0.577078016
    b_p = b_p * b_u + 0.961796694
    b_p = b_p * b_u + 2.88539008
    return b_p * b_s + b_e.to(tl.float32)


@triton.jit
def gumbel_bits(seed, i_b, i_h, o_position, o_j):
    """Gumbel noise -log(-log u) in bits. u is the midpoint of one of 2^23 intervals, from the first
    word of Philox."""
    b_i = (o_position + tl.zeros_like(o_j)).to(tl.uint32, bitcast=True)
    b_j = (o_j + tl.zeros_like(o_position)).to(tl.uint32, bitcast=True)
    b_zero = tl.zeros_like(b_i)
    b_b = b_zero + i_b.to(tl.uint32)
    b_h = b_zero + i_h.to(tl.uint32)
    b_word, _, _, _ = tl.philox(seed, b_b, b_h, b_i, b_j)
    b_u = ((b_word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - BELOW_ONE
    return -LOG2_LN2 - log2(-log2(b_u))


@triton.jit
def from_column(rows, o):
    return Slice(rows.data + o, rows.seq, rows.length, rows.line)


@triton.jit
def products(
    queries, keys, o_i, o_j, b_held, HOLDS_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Q K^T of queries o_i and keys o_j. b_held is the operand that the program owns. Above BLOCK_D
    columns it does not fit the registers, and both operands are loaded in parts."""
    if HEAD_DIM > BLOCK_D:
        b_qk = tl.zeros([o_i.shape[0], o_j.shape[0]], tl.float32)
        for o in tl.static_range(0, HEAD_DIM, BLOCK_D):
            b_q = load_rows(from_column(queries, o), o_i, HEAD_DIM - o, BLOCK_D)
            b_k = load_rows(from_column(keys, o), o_j, HEAD_DIM - o, BLOCK_D)
            b_qk += dot(b_q, tl.trans(b_k))
    elif HOLDS_KEYS:
        b_qk = dot(load_rows(queries, o_i, HEAD_DIM, BLOCK_D), tl.trans(b_held))
    else:
        b_qk = dot(b_held, tl.trans(load_rows(keys, o_j, HEAD_DIM, BLOCK_D)))
    return b_qk


@triton.jit
def exponents(b_qk, o_i, o_j, request, requests, factor, inverse_tau, seed, i_b, i_h):
    """Softmax exponents in bits; -inf where masked."""
    b_t = b_qk * factor
    if inverse_tau is not None:
        b_t += inverse_tau * gumbel_bits(seed, i_b, i_h, o_i + request.diagonal, o_j)
    m_seen = (o_i >= request.first_row) & (o_i < request.rows) & (o_j < request.columns)
    if requests.causal:
        m_seen = m_seen & (o_j <= o_i + request.diagonal)
    return tl.where(m_seen, b_t, -INF)


@triton.jit(do_not_specialize=[*LENGTHS, "seed", "window"])
def rows_kernel(
    q, k, row_max, weights, requests, inverse_tau, factor, seed, window, tokens_q, tokens_k, heads,
    group, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_block, i_h, i_b = program(blocks, heads)
    request = request_of(requests, window, tokens_q, tokens_k, i_b)
    first = request.first_row + i_block * BLOCK_M
    if first >= request.rows:
        return
    o_i = first + tl.arange(0, BLOCK_M)
    queries = slice_of(q, i_b, i_h, 0, request.rows)
    b_q = load_rows(queries, o_i, HEAD_DIM, BLOCK_D)
    keys = slice_of(k, i_b, i_h // group, 0, request.columns)
    end = request.columns
    if requests.causal:
        last = tl.minimum(first + BLOCK_M, request.rows) - 1
        end = tl.minimum(last + request.diagonal + 1, end)
    b_top = tl.full([BLOCK_M], -INF, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for j in range(0, end, BLOCK_N):
        o_j = j + tl.arange(0, BLOCK_N)
        b_qk = products(queries, keys, o_i, o_j, b_q, False, HEAD_DIM, BLOCK_D)
        b_t = exponents(
            b_qk, o_i[:, None], o_j[None, :], request, requests, factor, inverse_tau, seed, i_b, i_h
        )
        # online softmax: row_max, row_sum = row_sum exp2(m_old - m_new) + rowsum(exp2(t - m_new))
        b_new_top = tl.maximum(b_top, tl.max(b_t, 1))
        b_row_max = tl.where(b_new_top == -INF, 0.0, b_new_top)
        b_sum = b_sum * tl.exp2(b_top - b_row_max) + tl.sum(tl.exp2(b_t - b_row_max[:, None]), 1)
        b_top = b_new_top
    # Empty row: row_max = inf, so that P = 0.
    m_empty = b_sum == 0.0
    o_row = (i_b * heads + i_h) * tokens_q + o_i
    m_row = o_i < request.rows
    tl.store(row_max + o_row, tl.where(m_empty, INF, b_top), mask=m_row)
    tl.store(
        weights + o_row, tl.where(m_empty, 0.0, 1.0 / tl.where(m_empty, 1.0, b_sum)), mask=m_row
    )


@triton.jit(do_not_specialize=[*LENGTHS, "seed", "window"])
def columns_kernel(
    q, k, row_max, weights, scores, requests, inverse_tau, factor, seed, window, tokens_q, tokens_k,
    heads, group, blocks,
    HEAD_DIM: tl.constexpr, REDUCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_block, i_h, i_b = program(blocks, heads)
    request = request_of(requests, window, tokens_q, tokens_k, i_b)
    first = i_block * BLOCK_N
    o_j = first + tl.arange(0, BLOCK_N)
    keys = slice_of(k, i_b, i_h // group, 0, request.columns)
    b_k = load_rows(keys, o_j, HEAD_DIM, BLOCK_D)
    queries = slice_of(q, i_b, i_h, 0, request.rows)
    begin = request.first_row
    o_begin = begin + tl.zeros_like(o_j)
    if requests.causal:
        begin = tl.maximum(first - request.diagonal, begin)
        o_begin = tl.maximum(o_j - request.diagonal, o_begin)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for i in range(begin, request.rows, BLOCK_M):
        o_i = i + tl.arange(0, BLOCK_M)
        b_qk = products(queries, keys, o_i, o_j, b_k, True, HEAD_DIM, BLOCK_D)
        b_t = exponents(
            b_qk, o_i[:, None], o_j[None, :], request, requests, factor, inverse_tau, seed, i_b, i_h
        )
        o_row = (i_b * heads + i_h) * tokens_q + o_i
        b_row_max = tl.load(row_max + o_row, mask=o_i < request.rows, other=INF)
        b_weight = tl.load(weights + o_row, mask=o_i < request.rows, other=0.0)
        # P = exp2(t - row_max) / row_sum, summed over queries
        b_p = tl.exp2(b_t - b_row_max[:, None]) * b_weight[:, None]
        # Also masks NaN from a row that does not see the key.
        b_sum += tl.sum(tl.where(b_t == -INF, 0.0, b_p), 0)
    if REDUCE == "mean":
        b_sum /= tl.maximum(request.rows - request.first_row, 1).to(tl.float32)
    if REDUCE == "visible_mean":
        b_sum /= tl.maximum(request.rows - o_begin, 1).to(tl.float32)
    b_sum = tl.where(o_j < request.columns, b_sum, 0.0)
    o_score = (i_b * heads + i_h) * tokens_k + o_j
    tl.store(scores + o_score, b_sum, mask=o_j < tokens_k)


def attention_column_scores(a: Any) -> Tensor:
    batch, rows, heads, head_dim = a.q.shape
    columns, kv_heads = a.k.shape[1:3]
    together = a.head_reduce != "none"
    if heads == 0:
        return a.q.new_zeros((batch, kv_heads if together else 0, columns), dtype=torch.float32)
    group = heads // kv_heads
    window = rows if a.window_queries is None else min(a.window_queries, rows)
    scores = a.q.new_empty((batch, heads, columns), dtype=torch.float32)
    tiles = _tiles(head_dim, rows, columns, a.q.element_size())
    noisy = a.gumbel_tau > 0
    shared: tuple[Any, ...] = (
        Requests(a.seqlens_k, a.seqlens_q, int(a.causal)),
        1.0 / a.gumbel_tau if noisy else None,
        a.scale * LOG2E.value / (a.gumbel_tau if noisy else 1.0),
        a.seed,
        window,
        rows,
        columns,
        heads,
        group,
    )
    block_d = max(triton.next_power_of_2(head_dim), 16)
    if a.q.dtype == torch.float32:
        block_d = min(block_d, 128)
    options = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, **tiles}
    places = [Rows(t, t.stride(0), t.stride(1), t.stride(2)) for t in (a.q, a.k)]
    if a.lse is None:
        row_max = a.q.new_empty((batch, heads, rows), dtype=torch.float32)
        weights = torch.empty_like(row_max)
        blocks = triton.cdiv(window, tiles["BLOCK_M"])
        launch(
            rows_kernel, blocks * batch * heads, a.q, *places, row_max, weights, *shared, blocks,
            **options,
        )  # fmt: skip
    else:
        nothing = a.lse == -torch.inf
        row_max = torch.where(nothing, torch.inf, a.lse * LOG2E.value)
        weights = torch.where(nothing, 0.0, 1.0)
        row_max, weights = row_max.contiguous(), weights.expand(row_max.shape).contiguous()
    blocks = triton.cdiv(columns, tiles["BLOCK_N"])
    launch(
        columns_kernel, blocks * batch * heads, a.q, *places, row_max, weights, scores, *shared,
        blocks, REDUCE=a.reduce, **options,
    )  # fmt: skip
    if not together:
        return scores
    grouped = scores.view(batch, kv_heads, group, columns)
    return grouped.mean(2) if a.head_reduce == "group_mean" else grouped.amax(2)


def _tiles(head_dim: int, rows: int, columns: int, element_size: int) -> dict[str, int]:
    """The largest tiles that do not spill."""
    if INTERPRETED.value:
        # In the interpreter a tile costs milliseconds whatever its size; keep several tiles even
        # for short sequences.
        m, n = (
            min(max(triton.next_power_of_2(length) // 64, 32), 1024) for length in (rows, columns)
        )
        return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 1}
    if element_size == 4:
        m, n, warps = 16, 32, 4
    elif head_dim <= 128:
        m, n, warps = 64, 64, 4 if head_dim <= 64 else 8
    else:
        m, n, warps = 32, 32, 4
    stages = 2 if head_dim <= 128 else 1
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
