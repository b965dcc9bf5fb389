"""indexer_topk_select: scores of a stripe of queries, from which topk_select takes the lists. A
program owns all heads of one query and a tile of keys; consecutive programs share the key tile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill.select.rules import rows_of_request
from tokenmill.select.topk_select import SPEC as TOPK

from ..common import INF, Rows, dot, launch, lower_bound
from ..dense.kv_cache import held
from ..float8 import float8_values
from .keys import KEY_SIZES, KeyRows, key_sizes, length_of, load_keys
from .topk_select import topk_select

TILE_BYTES = 256  # one key column of a tile; larger float32 tiles spill
PIECE_BYTES = 128  # bytes of a row per step
SPARE_SCORES = 8192  # scores per query in memory, in addition to topk
MIN_ROWS = 64  # min rows of a stripe
MAX_SCORES = 2**26  # max scores of a stripe: 256 MB
FAR = 2**31 - 1
SIZES = ["first", "rows", "tokens", "queries", "batch", "halvings", "num_sink", "num_recent", "ld"]


@triton.jit
def packed_span(ends, i_b, rows):
    """Start and length of a sequence, clamped to the rows."""
    start = tl.minimum(tl.maximum(tl.load(ends + i_b), 0), rows).to(tl.int64)
    end = tl.minimum(tl.maximum(tl.load(ends + i_b + 1), 0), rows).to(tl.int64)
    return start, tl.maximum(end - start, 0)


@triton.jit(do_not_specialize=[*SIZES, *KEY_SIZES])
def score_kernel(
    q, k, weights, table, key_count, table_stride, page_size, pages, lengths, ends_q, ends_k,
    k_scale, out, out_lengths, first, rows, tokens, queries, batch, halvings, num_sink, num_recent,
    ld,
    CAUSAL: tl.constexpr, RELU: tl.constexpr, FLOAT8: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores the number of visible keys of a row and their scores, -inf for keys that are never
    listed: sink keys, and keys of a missing page."""
    keys = KeyRows(k.data, k.batch, k.seq, k.head, key_count, table, table_stride, page_size, pages)
    i = tl.program_id(0)
    i_row = (i % rows).to(tl.int64)
    i_n = (i // rows).to(tl.int64)
    i_t = first + i_row
    m_token = i_t >= 0
    i_b = i_t // queries
    i_i = i_t % queries
    count = tl.zeros([], tl.int64) + queries
    if ends_q is not None:
        i_b = lower_bound(ends_q, i_t * 0, i_t * 0 + batch + 1, i_t + 1, halvings) - 1
        m_token = (i_b >= 0) & (i_b < batch)
        i_b = tl.minimum(tl.maximum(i_b, 0), batch - 1)
        start, count = packed_span(ends_q, i_b, tokens)
        i_i = i_t - start
        m_token = m_token & (i_i >= 0) & (i_i < count)
        o_query = i_t
    else:
        o_query = i_i
    key_start = tl.zeros([], tl.int64)
    if ends_k is not None:
        key_start, length = packed_span(ends_k, i_b, key_count)
    else:
        length = length_of(lengths, i_b, key_count)
    end = length - num_recent
    if CAUSAL:
        end += i_i - count + 1
    end = tl.where(m_token & (end > num_sink), end, 0)
    if i_n == 0:
        tl.store(out_lengths + i_row, end.to(tl.int32))

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = (o_n >= num_sink) & (o_n < end)
    b_s = tl.zeros([BLOCK_N], tl.float32)
    if (i_n * BLOCK_N < end) & ((i_n + 1) * BLOCK_N > num_sink):
        o_h = tl.arange(0, BLOCK_H)
        m_h = o_h < HEADS
        p_q = q.data + i_b * q.batch + o_query * q.seq + o_h.to(tl.int64) * q.head
        b_z = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        m_there = m_n
        for piece in range((DIM + BLOCK_D - 1) // BLOCK_D):
            o_d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
            m_d = o_d < DIM
            b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_h[:, None] & m_d[None, :], other=0.0)
            b_k, m_there = load_keys(keys, i_b, 0, key_start + o_n, m_n, o_d, m_d)
            if FLOAT8:
                b_k = float8_values(b_k).to(b_q.dtype)
            # S = Q K^T
            b_z += dot(b_q, tl.trans(b_k))
        if k_scale is not None:
            scales = KeyRows(k_scale.data, k_scale.batch, k_scale.seq, k_scale.head, key_count,
                             table, table_stride, page_size, pages)  # fmt: skip
            o_one = tl.arange(0, 1)
            b_scale, _ = load_keys(scales, i_b, 0, key_start + o_n, m_n, o_one, o_one == 0)
            b_scale = tl.reshape(b_scale, [BLOCK_N])
            b_z *= (b_scale + (b_scale - b_scale))[None, :]  # NaN if the scale is not finite
        if RELU:
            b_z = tl.maximum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p_w = weights.data + i_b * weights.batch + o_query * weights.seq + o_h
        b_w = tl.load(p_w, mask=m_h, other=0.0).to(tl.float32)
        # score = sum over heads of w_h act(S_h)
        b_s = tl.sum(tl.where(m_h[:, None], b_w[:, None] * b_z, 0.0), 0)
        m_n = m_there
    tl.store(out + i_row * ld + o_n, tl.where(m_n, b_s, -INF), mask=o_n < end)


def _scale_rows(k_scale: Tensor | None, k: Tensor) -> Rows | None:
    """Scales as Rows; strides are 0 if all keys share one scale."""
    if k_scale is None:
        return None
    if k_scale.shape != k.shape[:-1]:
        return Rows(k_scale, 0, 0, 0)
    return Rows(k_scale, k_scale.stride(0) if k.dim() == 3 else 0, k_scale.stride(-1), 0)


def indexer_topk_select(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape, topk = a.q.shape[:-2], a.topk
    tokens, (heads, dim) = shape.numel(), a.q.shape[-2:]
    packed = a.cu_seqlens_q is not None
    batch = len(a.cu_seqlens_q) - 1 if packed else a.q.shape[0]
    indices = a.q.new_full((*shape, topk), -1, dtype=torch.int32)
    counts = a.q.new_zeros(shape, dtype=torch.int32)
    wide = (*shape, topk) if a.return_values else (0,)
    values = a.q.new_full(wide, -torch.inf, dtype=torch.float32)
    k, k_batch = held(a.k), a.k.stride(0)
    if a.cu_seqlens_k is not None:
        k, k_batch = k[None], 0
    sizes, key_count = key_sizes(k, a.block_table), rows_of_request(k, a.block_table)
    if tokens == 0 or key_count == 0 or batch == 0:
        return indices, counts, values
    block_k = min(a.block_k, key_count)
    blocks = triton.cdiv(key_count, block_k)
    ld = blocks * block_k
    stripe = min(tokens * (topk + SPARE_SCORES), MAX_SCORES) // ld
    stripe = min(tokens, max(stripe, MIN_ROWS))
    block_d = min(max(triton.next_power_of_2(dim), 16), PIECE_BYTES // a.q.element_size())
    tile_keys = TILE_BYTES // a.q.element_size()
    scores = a.q.new_empty((stripe, ld), dtype=torch.float32)
    lengths = a.q.new_empty((stripe,), dtype=torch.int32)
    query_rows = Rows(a.q, 0 if packed else a.q.stride(0), a.q.stride(-3), a.q.stride(-2))
    weight_rows = Rows(a.weights, 0 if packed else a.weights.stride(0), a.weights.stride(-2), 1)
    lists = (indices.view(-1, topk), counts.view(-1), values.view(-1, topk))
    for first in range(0, tokens, stripe):
        rows = min(stripe, tokens - first)
        launch(
            score_kernel, rows * triton.cdiv(ld, tile_keys), a.q, query_rows,
            Rows(k, k_batch, k.stride(1), 0), weight_rows, a.block_table, *sizes, a.seqlens_k,
            a.cu_seqlens_q, a.cu_seqlens_k, _scale_rows(a.k_scale, a.k), scores, lengths, first,
            rows, tokens, max(a.q.shape[1], 1), batch, (batch + 1).bit_length(),
            min(a.num_sink, FAR), min(a.num_recent, FAR), ld, CAUSAL=a.causal,
            RELU=a.activation == "relu", FLOAT8=a.k.dtype == torch.float8_e4m3fn, HEADS=heads,
            DIM=dim, BLOCK_H=max(triton.next_power_of_2(heads), 16), BLOCK_N=tile_keys,
            BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
        best, ends = scores[:rows], lengths[:rows]
        if block_k > 1:
            beyond = torch.arange(ld, device=a.q.device) >= ends[:, None]
            best = best.masked_fill_(beyond, -torch.inf).unflatten(1, (blocks, block_k)).amax(2)
            ends = ((ends.long() + (block_k - 1)) // block_k).int()
        found = topk_select(TOPK.record(best, topk, ends, return_values=a.return_values))
        for to, part in zip(lists, found[: 2 + a.return_values], strict=False):
            to[first : first + rows] = part
    return indices, counts, values
