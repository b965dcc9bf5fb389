"""Backward without atomics: one kernel owns query blocks, one key blocks, one tiles of a bias.

softmax: dz = P (dP - delta), delta = rowsum(dO O) - dlse. With post-sum decay F:
dz = P (F dP - delta), and dV uses P F. Other kinds, with weights f(z) and row factor norm:
dz = f'(z) (norm dP - delta), where delta is norm rowsum(dO O) - ds if a row sum s divides, else 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    FLOAT_MAX,
    INF,
    LENGTHS,
    LOG2E,
    NONE,
    SOFTMAX,
    Lengths,
    Rows,
    distance,
    dot,
    fade_of,
    head_of,
    key_block,
    load_rows,
    program,
    query_block,
    scores,
    sequence_of,
    slice_of,
    statistics_of,
    store_rows,
    tanh,
    visible_parts,
)
from ..weights import FLOAT16_SCALE, exponential, inverse, weighted, weights
from .masks import first_of, key_walk, query_walk, rules_of, seen


class Saved(NamedTuple):
    """What backward reads of forward, dout, and delta, which queries_kernel computes first."""

    dout: Rows
    lse: Tensor | None  # row statistic
    delta: Tensor | None
    q: Rows
    k: Rows
    v: Rows


class Queries(NamedTuple):
    """A tile of queries, its dout, and lse or the row factor."""

    b_q: Any
    b_dout: Any
    b_norm: Any
    o_row: Any  # offsets in row statistics
    m_row: Any


@triton.jit
def load_lse(p_lse, m_row, head):
    """lse in the unit of z; inf for rows that see no key, so that P = 0."""
    b_lse = tl.load(p_lse, mask=m_row, other=INF)
    return (tl.where(b_lse == -INF, INF, b_lse) - head.shift) * (LOG2E / head.log2e)


@triton.jit
def norm_of(lse, o_row, m_row, head, KIND: tl.constexpr, NORMALIZE: tl.constexpr):
    """Forward row statistic: lse for softmax, else the row factor from a sum or count."""
    b_norm = tl.zeros(m_row.shape, tl.float32)
    if KIND == "softmax":
        b_norm = load_lse(lse + o_row, m_row, head)
    elif NORMALIZE != "none":
        b_norm = inverse(tl.load(lse + o_row, mask=m_row, other=0.0), KIND, NORMALIZE)
    return b_norm


@triton.jit
def load_queries(saved, cu_seqlens, lengths, sequence, head, i_b, i_h, o_i, C):
    queries = slice_of(saved.q, i_b, i_h, sequence.q_start, sequence.q_length)
    douts = slice_of(saved.dout, i_b, i_h, sequence.q_start, sequence.q_length)
    b_q = load_rows(queries, o_i, C.HEAD_DIM, C.BLOCK_D)
    b_dout = load_rows(douts, o_i, C.VALUE_DIM, C.BLOCK_V)
    tokens, start = lengths.tokens_q, sequence.q_start
    o_row = statistics_of(cu_seqlens.q, i_b, i_h, lengths.heads, tokens, start) + o_i
    m_row = o_i < sequence.q_length
    b_norm = norm_of(saved.lse, o_row, m_row, head, C.KIND, C.NORMALIZE)
    return Queries(b_q, b_dout, b_norm, o_row, m_row)


@triton.jit
def load_delta(delta, queries, C):
    b_delta = tl.zeros(queries.m_row.shape, tl.float32)
    if C.KIND == "softmax" or C.NORMALIZE == "sum":
        b_delta = tl.load(delta + queries.o_row, mask=queries.m_row, other=0.0)
    return b_delta


@triton.jit
def gradients(
    b_qk, b_dp, o_i, o_j, b_norm, b_delta, terms, head, sequence, m_seen,
    KIND: tl.constexpr = SOFTMAX, NORMALIZE: tl.constexpr = NONE, FAST: tl.constexpr = False,
):  # fmt: skip
    """P and dz of a tile. o_i and o_j broadcast along the query and key axes. b_norm: lse for
    softmax, else the row factor. m_seen None: no masked pair."""
    b_z = scores(b_qk, o_i, o_j, terms, head, sequence)
    if KIND == "softmax":
        b_p = exponential(b_z - b_norm, head)
        b_fade = fade_of(o_i, o_j, terms, head, sequence)
        if b_fade is not None:
            b_dz = b_p * (b_dp * b_fade - b_delta)
            b_p *= b_fade
        else:
            b_dz = b_p * (b_dp - b_delta)
    else:
        b_p, b_slope = weights(b_z, head, KIND, FAST)
        if NORMALIZE != "none":
            b_p *= b_norm
            b_dp *= b_norm
        if NORMALIZE == "sum":
            b_dp -= b_delta
        if KIND == "relu":  # a slope of 0 masks NaN and inf
            b_dz = tl.where(b_slope == 0.0, 0.0, b_dp)
        else:
            b_dz = b_slope * b_dp
    if m_seen is not None:
        b_p = tl.where(m_seen, b_p, 0.0)
        b_dz = tl.where(m_seen, b_dz, 0.0)
    if terms.bias is not None:
        b_dz = tl.where(b_z >= FLOAT_MAX, 0.0, b_dz)
    return b_p, b_dz


@triton.jit
def through_softcap(b_dz, b_qk, terms):
    """Gradient of scale q.k from dz: backward of the softcap."""
    if terms.softcap is not None:
        b_tanh = tanh(b_qk * terms.factor)
        b_dz *= 1.0 - b_tanh * b_tanh
    return b_dz


@triton.jit
def query_gradients(queries, b_delta, b_k, b_v, o_i, o_j, terms, head, sequence, m_seen, C):
    """Q K^T, dP, P and dz of a tile of queries and keys."""
    # S = Q K^T, dP = dO V^T
    b_qk = dot(queries.b_q, tl.trans(b_k))
    b_dp = dot(queries.b_dout, tl.trans(b_v))
    b_p, b_dz = gradients(
        b_qk, b_dp, o_i[:, None], o_j[None, :], queries.b_norm[:, None], b_delta[:, None],
        terms, head, sequence, m_seen, C.KIND, C.NORMALIZE, C.FAST,
    )  # fmt: skip
    return b_qk, b_dp, b_p, b_dz


@triton.jit
def store_delta(saved, dlse, outs, queries, o_i, C):
    """delta of a block of queries."""
    b_out = load_rows(outs, o_i, C.VALUE_DIM, C.BLOCK_V)
    # delta = rowsum(dO O)
    b_delta = tl.sum(queries.b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    if C.KIND != "softmax":
        b_delta *= queries.b_norm
    if C.KIND == "linear":  # backward of max(|s|, 1): zero where |s| <= 1
        b_sum = tl.load(saved.lse + queries.o_row, mask=queries.m_row, other=0.0)
        b_sign = tl.where(b_sum > 1.0, 1.0, tl.where(b_sum < -1.0, -1.0, 0.0))
        b_delta *= b_sign
    if dlse is not None:
        b_delta -= tl.load(dlse + queries.o_row, mask=queries.m_row, other=0.0)
    tl.store(saved.delta + queries.o_row, b_delta, mask=queries.m_row)
    return b_delta


@triton.jit
def softmax_bias_sums(lse, dlse, sink, b_delta, queries, i_h):
    """Row sums of dz of softmax, dlse + P_sink delta: the sum itself cancels to the rounding errors
    of P and dP."""
    b_nats = tl.load(lse + queries.o_row, mask=queries.m_row, other=-INF)
    b_sum = tl.zeros(b_nats.shape, tl.float32)
    if sink is not None:
        sink_logit = tl.load(sink + i_h)
        b_p_sink = tl.where(b_nats == sink_logit, 1.0, tl.exp(sink_logit - b_nats))
        b_sum += b_p_sink * b_delta
    if dlse is not None:
        b_sum += tl.load(dlse + queries.o_row, mask=queries.m_row, other=0.0)
    b_sum = tl.where(b_nats == -INF, 0.0, b_sum)
    return tl.where(b_nats == b_nats, b_sum, b_nats)  # NaN


@triton.jit(do_not_specialize=LENGTHS)
def queries_kernel(
    saved, dlse, out, dq, sink, bias_sums, slope_sums, lists, terms, window, mask, cu_seqlens,
    tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks,
    C,
):  # fmt: skip
    """One block of queries: dq, delta, and row sums of dz and of -dz distance."""
    lengths = Lengths(tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks)
    block, sequence = query_block(cu_seqlens, lengths, heads, C.BLOCK_M)
    i_b, i_h = block.i_b, block.i_h
    if block.first >= sequence.q_length:
        return
    head = head_of(terms, i_b, i_h, sequence.k_length, C.KIND)
    rules = rules_of(mask, i_b, i_h, sequence, tokens_q, tokens_k, C.RANGES)
    keys = slice_of(saved.k, i_b, i_h // group, sequence.k_start, sequence.k_length)
    values = slice_of(saved.v, i_b, i_h // group, sequence.k_start, sequence.k_length)
    o_i = block.first + tl.arange(0, C.BLOCK_M)
    queries = load_queries(saved, cu_seqlens, lengths, sequence, head, i_b, i_h, o_i, C)
    b_delta = tl.zeros([C.BLOCK_M], tl.float32)
    b_bias_sum = tl.zeros([C.BLOCK_M], tl.float32)
    if C.KIND == "softmax" or C.NORMALIZE == "sum":
        outs = slice_of(out, i_b, i_h, sequence.q_start, sequence.q_length)
        b_delta = store_delta(saved, dlse, outs, queries, o_i, C)
    if C.KIND == "softmax" and bias_sums is not None:
        b_bias_sum = softmax_bias_sums(saved.lse, dlse, sink, b_delta, queries, i_h)

    b_dq = tl.zeros([C.BLOCK_M, C.BLOCK_D], tl.float32)
    b_slope_sum = tl.zeros([C.BLOCK_M], tl.float32)
    walk = key_walk(lists, window, cu_seqlens, lengths, block, sequence, C)
    ENTRY: tl.constexpr = C.BLOCK_N if lists.data is None else 1
    for PART in tl.static_range(1 if window.left is None or lists.data is not None else 0, 3):
        for n in range(walk.parts[PART], walk.parts[PART + 1], ENTRY):
            o_j = first_of(walk, n, PART, C.BLOCK_N) + tl.arange(0, C.BLOCK_N)
            b_k = load_rows(keys, o_j, C.HEAD_DIM, C.BLOCK_D)
            b_v = load_rows(values, o_j, C.VALUE_DIM, C.BLOCK_V)
            m_seen = None
            if PART != 1:
                m_seen = seen(o_i[:, None], o_j[None, :], sequence, window, rules, C.RANGES)
            b_qk, b_dp, b_p, b_dz = query_gradients(
                queries, b_delta, b_k, b_v, o_i, o_j, terms, head, sequence, m_seen, C
            )
            if C.KIND != "softmax" and bias_sums is not None:
                b_bias_sum += tl.sum(b_dz, 1)
            if slope_sums is not None:
                b_distance = distance(o_i[:, None], o_j[None, :], terms, sequence)
                b_moved = b_dz
                if terms.post_decay is not None:  # a weight of 0 masks a NaN
                    b_moved = tl.where(b_p == 0.0, 0.0, b_p * b_dp)
                b_slope_sum -= tl.sum(b_moved * b_distance, 1)
            # dQ += dz K
            b_dq += weighted(through_softcap(b_dz, b_qk, terms), b_k, C.KIND)

    dqs = slice_of(dq, i_b, i_h, sequence.q_start, sequence.q_length)
    store_rows(dqs, o_i, b_dq * terms.scale, C.HEAD_DIM)
    if bias_sums is not None:
        tl.store(bias_sums + tl.program_id(0), tl.sum(b_bias_sum, 0))
    if slope_sums is not None:
        tl.store(slope_sums + tl.program_id(0), tl.sum(b_slope_sum, 0))


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    saved, dk, dv, lists, terms, window, mask, cu_seqlens,
    tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks,
    C,
):  # fmt: skip
    """dk and dv of a block of keys, summed over the query heads of its GQA group. Scores are
    transposed: P^T and dz^T are left operands of the next products."""
    lengths = Lengths(tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks)
    block, sequence = key_block(cu_seqlens, lengths, heads // group, C.BLOCK_N)
    i_b, i_kv = block.i_b, block.i_h
    if block.first >= sequence.k_length:
        return
    o_j = block.first + tl.arange(0, C.BLOCK_N)
    keys = slice_of(saved.k, i_b, i_kv, sequence.k_start, sequence.k_length)
    b_k = load_rows(keys, o_j, C.HEAD_DIM, C.BLOCK_D)
    values = slice_of(saved.v, i_b, i_kv, sequence.k_start, sequence.k_length)
    b_v = load_rows(values, o_j, C.VALUE_DIM, C.BLOCK_V)

    b_dk = tl.zeros([C.BLOCK_N, C.BLOCK_D], tl.float32)
    b_dv = tl.zeros([C.BLOCK_N, C.BLOCK_V], tl.float32)
    walk = query_walk(lists, window, cu_seqlens, lengths, block, sequence, C)
    ENTRY: tl.constexpr = C.BLOCK_M if lists.data is None else 1
    for PART in tl.static_range(1 if window.right is None or lists.data is not None else 0, 3):
        # One loop over heads and their query blocks, so that loads are pipelined across heads.
        count = tl.cdiv(walk.parts[PART + 1] - walk.parts[PART], ENTRY)
        for n in range(group * count):
            i_h = i_kv * group + n // count
            head = head_of(terms, i_b, i_h, sequence.k_length, C.KIND)
            entry = walk.parts[PART] + n % count * ENTRY
            o_i = first_of(walk, entry, PART, C.BLOCK_M) + tl.arange(0, C.BLOCK_M)
            queries = load_queries(saved, cu_seqlens, lengths, sequence, head, i_b, i_h, o_i, C)
            b_delta = load_delta(saved.delta, queries, C)
            # S^T = K Q^T, dP^T = V dO^T
            b_qk = dot(b_k, tl.trans(queries.b_q))
            b_dp = dot(b_v, tl.trans(queries.b_dout))
            m_seen = None
            if PART != 1:
                rules = rules_of(mask, i_b, i_h, sequence, tokens_q, tokens_k, C.RANGES)
                m_seen = seen(o_i[None, :], o_j[:, None], sequence, window, rules, C.RANGES)
            b_p, b_dz = gradients(
                b_qk, b_dp, o_i[None, :], o_j[:, None], queries.b_norm[None, :],
                b_delta[None, :], terms, head, sequence, m_seen, C.KIND, C.NORMALIZE, C.FAST,
            )  # fmt: skip
            if C.KIND == "sigmoid" and queries.b_q.dtype == tl.float16:
                b_p *= FLOAT16_SCALE
            # dV += P^T dO, dK += dz^T Q
            b_dv += weighted(b_p, queries.b_dout, C.KIND)
            b_dk += weighted(through_softcap(b_dz, b_qk, terms), queries.b_q, C.KIND)

    if C.KIND == "sigmoid" and b_k.dtype == tl.float16:
        b_dv *= 1.0 / FLOAT16_SCALE
    dks = slice_of(dk, i_b, i_kv, sequence.k_start, sequence.k_length)
    store_rows(dks, o_j, b_dk * terms.scale, C.HEAD_DIM)
    dvs = slice_of(dv, i_b, i_kv, sequence.k_start, sequence.k_length)
    store_rows(dvs, o_j, b_dv, C.VALUE_DIM)


BIAS_LENGTHS = ["bias_heads", "bias_rows", "bias_columns", "sum_batch", "sum_heads"]


@triton.jit
def biased_keys(first_i, first_j, o_i, sequence, window, mask, rules, C, SUM_K: tl.constexpr):
    """Ends of the keys of a tile of dbias, all keys if SUM_K, that queries o_i from first_i on
    see."""
    last = tl.minimum(first_i + C.BLOCK_M, sequence.q_length) - 1
    parts = visible_parts(
        first_i, last, sequence.diagonal, window.left, window.right, sequence.k_length, C.BLOCK_N
    )
    begin = parts[0]
    end = parts[3]
    if not SUM_K:
        begin = tl.maximum(begin, first_j)
        end = tl.minimum(first_j + C.BLOCK_N, end)
        if mask.ranges is not None or mask.q_spans is not None:
            o_j = first_j + tl.arange(0, C.BLOCK_N)
            m_seen = seen(o_i[:, None], o_j[None, :], sequence, window, rules, C.RANGES)
            m_row = tl.max(m_seen.to(tl.int32), 1)
            end = tl.where(tl.max(m_row, 0) != 0, end, begin)
    return begin, end


@triton.jit(do_not_specialize=[*LENGTHS, *BIAS_LENGTHS])
def bias_kernel(
    saved, dbias, bias_heads, bias_rows, bias_columns, sum_batch, sum_heads,
    terms, window, mask, cu_seqlens, tokens_q, tokens_k, longest_q, longest_k, heads, group,
    C, SUM_Q: tl.constexpr, SUM_K: tl.constexpr,
):  # fmt: skip
    """A tile of dbias [B|1, H|1, rows, columns]: dz summed, in order, over the broadcast
    dimensions: sum_batch sequences, sum_heads heads, all queries if SUM_Q, all keys if SUM_K."""
    lengths = Lengths(tokens_q, tokens_k, longest_q, longest_k, heads, group)
    blocks_k = tl.cdiv(bias_columns, C.BLOCK_N)
    i_tile, i_bias_h, i_bias_b = program(tl.cdiv(bias_rows, C.BLOCK_M) * blocks_k, bias_heads)
    first_i = i_tile // blocks_k * C.BLOCK_M
    first_j = i_tile % blocks_k * C.BLOCK_N
    b_sum = tl.zeros([C.BLOCK_M, C.BLOCK_N], tl.float32)
    for i_b in range(i_bias_b, i_bias_b + sum_batch):
        sequence = sequence_of(cu_seqlens, lengths, i_b)
        stop_i = sequence.q_length
        if not SUM_Q:
            stop_i = tl.minimum(first_i + C.BLOCK_M, stop_i)
        for i_h in range(i_bias_h, i_bias_h + sum_heads):
            head = head_of(terms, i_b, i_h, sequence.k_length, C.KIND)
            rules = rules_of(mask, i_b, i_h, sequence, tokens_q, tokens_k, C.RANGES)
            keys = slice_of(saved.k, i_b, i_h // group, sequence.k_start, sequence.k_length)
            values = slice_of(saved.v, i_b, i_h // group, sequence.k_start, sequence.k_length)
            for i in range(first_i, stop_i, C.BLOCK_M):
                o_i = i + tl.arange(0, C.BLOCK_M)
                queries = load_queries(saved, cu_seqlens, lengths, sequence, head, i_b, i_h, o_i, C)
                b_delta = load_delta(saved.delta, queries, C)
                begin, end = biased_keys(i, first_j, o_i, sequence, window, mask, rules, C, SUM_K)
                for j in range(begin, end, C.BLOCK_N):
                    o_j = j + tl.arange(0, C.BLOCK_N)
                    b_k = load_rows(keys, o_j, C.HEAD_DIM, C.BLOCK_D)
                    b_v = load_rows(values, o_j, C.VALUE_DIM, C.BLOCK_V)
                    m_seen = seen(o_i[:, None], o_j[None, :], sequence, window, rules, C.RANGES)
                    # dbias += dz
                    _, _, _, b_dz = query_gradients(
                        queries, b_delta, b_k, b_v, o_i, o_j, terms, head, sequence, m_seen, C
                    )
                    b_sum += b_dz

    if SUM_Q:
        b_sum = tl.sum(b_sum, 0, keep_dims=True)
    if SUM_K:
        b_sum = tl.sum(b_sum, 1, keep_dims=True)
    o_i = first_i + tl.arange(0, b_sum.shape[0])[:, None]
    o_j = first_j + tl.arange(0, b_sum.shape[1])[None, :]
    p_tile = dbias + ((i_bias_b * bias_heads + i_bias_h) * bias_rows + o_i) * bias_columns + o_j
    tl.store(p_tile, b_sum, mask=(o_i < bias_rows) & (o_j < bias_columns))
