"""Scores of few rows against all keys: exponents of a key block for all rows of a GQA group, then
row_max and row_sum, then results per key block."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INF, INTERPRETED, LENGTHS, LOG2E, Rows, dot, launch, load_rows, slice_of
from .attention_column_scores import clamped

NOWHERE = tl.constexpr(2**31 - 1)  # greater than any key index


@triton.jit
def end_of(o_r, rows, length, CAUSAL: tl.constexpr):
    """Number of keys visible to row r, a prefix."""
    o_end = o_r - o_r + length
    if CAUSAL:
        o_end = tl.maximum(tl.minimum(o_r + length - rows + 1, length), 0)
    return o_end


@triton.jit(do_not_specialize=[*LENGTHS, "rows"])
def exponents_kernel(
    q, k, exponents, lengths, factor, rows, tokens_k, heads, group, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    kv_heads = heads // group
    i_kv = (i // blocks) % kv_heads
    i_b = (i // blocks // kv_heads).to(tl.int64)
    length = clamped(lengths, i_b, tokens_k)
    o_j = (i % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = load_rows(slice_of(k, i_b, i_kv, 0, length), o_j, HEAD_DIM, BLOCK_D)
    o_d = tl.arange(0, BLOCK_D)
    for row in range(0, group * rows, BLOCK_R):
        o_row = row + tl.arange(0, BLOCK_R)
        o_h = i_kv * group + o_row // rows
        p_q = (
            q.data + i_b * q.batch + (o_row % rows).to(tl.int64) * q.seq + o_h.to(tl.int64) * q.head
        )
        m_row = o_row < group * rows
        m_q = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
        # S = Q K^T, in bits
        b_t = dot(b_q, tl.trans(b_k)) * factor
        o_out = (i_b * heads * rows + i_kv * group * rows + o_row).to(tl.int64) * tokens_k
        m_t = m_row[:, None] & (o_j < length)[None, :]
        tl.store(exponents + o_out[:, None] + o_j[None, :], b_t, mask=m_t)


@triton.jit(do_not_specialize=[*LENGTHS, "rows"])
def weights_kernel(
    exponents, row_max, weights, lengths, rows, tokens_k, heads,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    length = clamped(lengths, i_row // rows // heads, tokens_k)
    end = end_of((i_row % rows).to(tl.int32), rows, length, CAUSAL)
    p_t = exponents + i_row * tokens_k
    b_top = tl.full([BLOCK], -INF, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for j in range(0, end, BLOCK):
        o_j = j + tl.arange(0, BLOCK)
        b_t = tl.load(p_t + o_j, mask=o_j < end, other=-INF)
        # online softmax per lane
        b_new_top = tl.maximum(b_top, b_t)
        b_row_max = tl.where(b_new_top == -INF, 0.0, b_new_top)
        b_sum = b_sum * tl.exp2(b_top - b_row_max) + tl.exp2(b_t - b_row_max)
        b_top = b_new_top
    top = tl.max(b_top, 0)
    finite = tl.where(top == -INF, 0.0, top)
    total = tl.sum(b_sum * tl.exp2(b_top - finite), 0)
    # Empty row: row_max = inf, so that P = 0.
    tl.store(row_max + i_row, tl.where(total == 0.0, INF, top))
    tl.store(weights + i_row, tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total)))


@triton.jit(do_not_specialize=[*LENGTHS, "rows", "skip"])
def argmax_kernel(
    exponents, row_max, places, lengths, rows, tokens_k, skip, heads,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Index of the first maximum exponent of a row. NaN counts as +inf."""
    i_row = tl.program_id(0).to(tl.int64)
    length = clamped(lengths, i_row // rows // heads, tokens_k)
    end = end_of((i_row % rows).to(tl.int32), rows, length, CAUSAL)
    if row_max is not None:  # row_max = +inf marks an empty row
        end = tl.where(tl.load(row_max + i_row) == INF, 0, end)
    p_t = exponents + i_row * tokens_k
    b_top = tl.full([BLOCK], -INF, tl.float32)
    b_place = tl.full([BLOCK], NOWHERE, tl.int32)
    for j in range(skip, end, BLOCK):
        o_j = j + tl.arange(0, BLOCK)
        b_t = tl.load(p_t + o_j, mask=o_j < end, other=-INF)
        b_t = tl.where(b_t == b_t, b_t, INF)
        m_better = (o_j < end) & ((b_t > b_top) | (b_place == NOWHERE))
        b_top = tl.where(m_better, b_t, b_top)
        b_place = tl.where(m_better, o_j, b_place)
    place = tl.min(tl.where(b_top == tl.max(b_top, 0), b_place, NOWHERE), 0)
    tl.store(places + i_row, tl.where(place == NOWHERE, -1, place))


@triton.jit(do_not_specialize=[*LENGTHS, "rows", "skip"])
def reduce_kernel(
    exponents, row_max, weights, scores, lengths, rows, tokens_k, skip, heads, blocks,
    CAUSAL: tl.constexpr, REDUCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_b = (i // blocks).to(tl.int64)
    length = clamped(lengths, i_b, tokens_k)
    wanted = tokens_k - skip
    o_out = (i % blocks) * BLOCK + tl.arange(0, BLOCK)
    o_j = skip + o_out
    m_out = o_out < wanted
    b_score = tl.zeros([BLOCK], tl.float32)
    for row in range(heads * rows):
        i_row = i_b * heads * rows + row
        m_seen = o_j < end_of(row % rows, rows, length, CAUSAL)
        b_t = tl.load(exponents + i_row * tokens_k + o_j, mask=m_seen, other=-INF)
        # P = exp2(t - row_max) / row_sum
        b_w = tl.exp2(b_t - tl.load(row_max + i_row)) * tl.load(weights + i_row)
        b_w = tl.where(m_seen, b_w, 0.0)
        if REDUCE == "none":
            tl.store(scores + i_row * wanted + o_out, b_w, mask=m_out)
        elif REDUCE == "max":
            b_score = tl.where((b_w > b_score) | (b_w != b_w), b_w, b_score)
        else:
            b_score += b_w
    if REDUCE == "mean":
        b_score /= (heads * rows).to(tl.float32)
    if REDUCE != "none":
        tl.store(scores + i_b * wanted + o_out, b_score, mask=m_out)


def attention_row_scores(a: Any) -> Tensor:
    batch, rows, heads, head_dim = a.q.shape
    columns, kv_heads = a.k.shape[1:3]
    wanted = columns - a.skip
    shape = (batch, heads, rows, wanted) if a.reduce == "none" else (batch, wanted)
    if heads * rows == 0 and a.reduce != "argmax":
        return a.q.new_zeros(shape, dtype=torch.float32)
    if a.reduce == "argmax":
        scores = a.q.new_full((batch, heads, rows), -1, dtype=torch.int32)
    else:
        scores = a.q.new_empty(shape, dtype=torch.float32)
    if scores.numel() == 0 or wanted == 0:
        return scores
    exponents = a.q.new_empty((batch, heads, rows, columns), dtype=torch.float32)
    factor = a.scale * LOG2E.value
    if a.reduce == "argmax":
        # argmax needs only the order of exponents: a factor of +-1 keeps ties exact.
        factor = float((a.scale > 0) - (a.scale < 0))
    group = heads // kv_heads
    block_n = 256 if INTERPRETED.value else 64 if head_dim <= 128 else 32
    blocks = triton.cdiv(columns, block_n)
    places = [Rows(t, t.stride(0), t.stride(1), t.stride(2)) for t in (a.q, a.k)]
    launch(
        exponents_kernel, blocks * batch * kv_heads, a.q, *places, exponents, a.seqlens_k,
        factor, rows, columns, heads, group, blocks, HEAD_DIM=head_dim, BLOCK_R=16,
        BLOCK_N=block_n, BLOCK_D=max(triton.next_power_of_2(head_dim), 16), num_warps=4,
    )  # fmt: skip
    if a.lse is not None:
        nothing = a.lse == -torch.inf
        row_max = torch.where(nothing, torch.inf, a.lse * LOG2E.value).contiguous()
    if a.reduce == "argmax":
        launch(
            argmax_kernel, batch * heads * rows, a.q, exponents, None if a.lse is None else row_max,
            scores, a.seqlens_k, rows, columns, a.skip, heads, CAUSAL=a.causal, BLOCK=1024,
            num_warps=4,
        )  # fmt: skip
        return scores
    if a.lse is None:
        row_max = a.q.new_empty((batch, heads, rows), dtype=torch.float32)
        weights = torch.empty_like(row_max)
        launch(
            weights_kernel, batch * heads * rows, a.q, exponents, row_max, weights, a.seqlens_k,
            rows, columns, heads, CAUSAL=a.causal, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    else:
        weights = torch.where(nothing, 0.0, torch.ones_like(row_max))
    blocks = triton.cdiv(wanted, 256)
    launch(
        reduce_kernel, blocks * batch, a.q, exponents, row_max, weights, scores, a.seqlens_k, rows,
        columns, a.skip, heads, blocks, CAUSAL=a.causal, REDUCE=a.reduce, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return scores
