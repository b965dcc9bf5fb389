"""Backward without atomics: one kernel owns query blocks, one key blocks, one tiles of a bias.

softmax: dz = P (dP - delta), delta = rowsum(dO O) - dlse. With post-sum decay F:
dz = P (F dP - delta), and dV uses P F. Other kinds, with weights f(z) and row factor norm:
dz = f'(z) (norm dP - delta), where delta is norm rowsum(dO O) - ds if a row sum s divides, else 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import (
    FLOAT_MAX,
    INF,
    LENGTHS,
    LOG2E,
    distance,
    dot,
    fade_of,
    head_of,
    load_rows,
    program,
    scores,
    sequence_of,
    slice_of,
    statistics_of,
    store_rows,
    tanh,
    visible_parts,
)
from ..weights import FLOAT16_SCALE, exponential, inverse, weighted, weights
from .masks import COUNTS, first_of, list_of, listed_parts, rules_of, seen


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
def delta_of(delta, o_row, m_row, KIND: tl.constexpr, NORMALIZE: tl.constexpr):
    b_delta = tl.zeros(m_row.shape, tl.float32)
    if KIND == "softmax" or NORMALIZE == "sum":
        b_delta = tl.load(delta + o_row, mask=m_row, other=0.0)
    return b_delta


@triton.jit
def gradients(
    b_qk,
    b_dp,
    o_i,
    o_j,
    b_norm,
    b_delta,
    terms,
    head,
    sequence,
    m_seen,
    KIND: tl.constexpr = "softmax",
    NORMALIZE: tl.constexpr = "none",
    FAST: tl.constexpr = False,
):
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


@triton.jit(do_not_specialize=LENGTHS)
def queries_kernel(
    dout,
    dlse,
    out,
    lse,
    delta,
    q,
    k,
    v,
    dq,
    sink,
    bias_sums,
    slope_sums,
    lists,
    terms,
    window,
    mask,
    cu_seqlens_q,
    cu_seqlens_k,
    tokens_q,
    tokens_k,
    longest_q,
    longest_k,
    heads,
    group,
    blocks,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FAST: tl.constexpr,
    RANGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One block of queries: dq, delta, and row sums of dz and of -dz distance. For softmax, a row
    of dz sums to dlse + P_sink delta; this closed form is used because the sum itself cancels to
    the rounding errors of P and dP."""
    i_block, i_h, i_b = program(blocks, heads)
    # Reversed order: under a causal mask the last queries have most keys and start first.
    first = (blocks - 1 - i_block) * BLOCK_M
    sequence = sequence_of(
        cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k, longest_q, longest_k, i_b
    )
    if first >= sequence.q_length:
        return
    head = head_of(terms, i_b, i_h, sequence.k_length, KIND)
    keys = slice_of(k, i_b, i_h // group, sequence.k_start, sequence.k_length)
    values = slice_of(v, i_b, i_h // group, sequence.k_start, sequence.k_length)
    o_i = first + tl.arange(0, BLOCK_M)
    queries = slice_of(q, i_b, i_h, sequence.q_start, sequence.q_length)
    b_q = load_rows(queries, o_i, HEAD_DIM, BLOCK_D)
    douts = slice_of(dout, i_b, i_h, sequence.q_start, sequence.q_length)
    b_dout = load_rows(douts, o_i, VALUE_DIM, BLOCK_V)
    o_row = statistics_of(cu_seqlens_q, i_b, i_h, heads, tokens_q, sequence.q_start)
    m_i = o_i < sequence.q_length
    b_norm = norm_of(lse, o_row + o_i, m_i, head, KIND, NORMALIZE)
    b_delta = tl.zeros([BLOCK_M], tl.float32)
    b_bias_sum = tl.zeros([BLOCK_M], tl.float32)
    if KIND == "softmax" or NORMALIZE == "sum":
        outs = slice_of(out, i_b, i_h, sequence.q_start, sequence.q_length)
        b_out = load_rows(outs, o_i, VALUE_DIM, BLOCK_V)
        # delta = rowsum(dO O)
        b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
        if KIND != "softmax":
            b_delta *= b_norm
        if KIND == "linear":  # backward of max(|s|, 1): zero where |s| <= 1
            b_sum = tl.load(lse + o_row + o_i, mask=m_i, other=0.0)
            b_sign = tl.where(b_sum > 1.0, 1.0, tl.where(b_sum < -1.0, -1.0, 0.0))
            b_delta *= b_sign
        if dlse is not None:
            b_delta -= tl.load(dlse + o_row + o_i, mask=m_i, other=0.0)
        tl.store(delta + o_row + o_i, b_delta, mask=m_i)
    if KIND == "softmax" and bias_sums is not None:
        b_nats = tl.load(lse + o_row + o_i, mask=m_i, other=-INF)
        if sink is not None:
            sink_logit = tl.load(sink + i_h)
            b_p_sink = tl.where(b_nats == sink_logit, 1.0, tl.exp(sink_logit - b_nats))
            b_bias_sum += b_p_sink * b_delta
        if dlse is not None:
            b_bias_sum += tl.load(dlse + o_row + o_i, mask=m_i, other=0.0)
        b_bias_sum = tl.where(b_nats == -INF, 0.0, b_bias_sum)
        b_bias_sum = tl.where(b_nats == b_nats, b_bias_sum, b_nats)  # NaN

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_slope_sum = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(first + BLOCK_M, sequence.q_length) - 1
    rules = rules_of(mask, i_b, i_h, sequence, tokens_q, tokens_k, RANGES)
    band = visible_parts(
        first, last, sequence.diagonal, window.left, window.right, sequence.k_length, BLOCK_N
    )
    width = COUNTS + tl.cdiv(longest_k, BLOCK_N)
    p_list = list_of(lists, width, cu_seqlens_q, i_b, i_h, blocks, first, sequence.q_start, BLOCK_M)
    parts = listed_parts(p_list, band)
    ENTRY: tl.constexpr = BLOCK_N if lists.data is None else 1
    for PART in tl.static_range(1 if window.left is None or p_list is not None else 0, 3):
        for n in range(parts[PART], parts[PART + 1], ENTRY):
            o_j = first_of(p_list, width, n, PART, BLOCK_N) + tl.arange(0, BLOCK_N)
            b_k = load_rows(keys, o_j, HEAD_DIM, BLOCK_D)
            b_v = load_rows(values, o_j, VALUE_DIM, BLOCK_V)
            # S = Q K^T, dP = dO V^T
            b_qk = dot(b_q, tl.trans(b_k))
            b_dp = dot(b_dout, tl.trans(b_v))
            m_seen = None
            if PART != 1:
                m_seen = seen(o_i[:, None], o_j[None, :], sequence, window, rules, RANGES)
            b_p, b_dz = gradients(
                b_qk,
                b_dp,
                o_i[:, None],
                o_j[None, :],
                b_norm[:, None],
                b_delta[:, None],
                terms,
                head,
                sequence,
                m_seen,
                KIND,
                NORMALIZE,
                FAST,
            )
            if KIND != "softmax" and bias_sums is not None:
                b_bias_sum += tl.sum(b_dz, 1)
            if slope_sums is not None:
                b_distance = distance(o_i[:, None], o_j[None, :], terms, sequence)
                b_moved = b_dz
                if terms.post_decay is not None:  # a weight of 0 masks a NaN
                    b_moved = tl.where(b_p == 0.0, 0.0, b_p * b_dp)
                b_slope_sum -= tl.sum(b_moved * b_distance, 1)
            # dQ += dz K
            b_dq += weighted(through_softcap(b_dz, b_qk, terms), b_k, KIND)

    dqs = slice_of(dq, i_b, i_h, sequence.q_start, sequence.q_length)
    store_rows(dqs, o_i, b_dq * terms.scale, HEAD_DIM)
    if bias_sums is not None:
        tl.store(bias_sums + tl.program_id(0), tl.sum(b_bias_sum, 0))
    if slope_sums is not None:
        tl.store(slope_sums + tl.program_id(0), tl.sum(b_slope_sum, 0))


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    dout,
    lse,
    delta,
    q,
    k,
    v,
    dk,
    dv,
    lists,
    terms,
    window,
    mask,
    cu_seqlens_q,
    cu_seqlens_k,
    tokens_q,
    tokens_k,
    longest_q,
    longest_k,
    heads,
    group,
    blocks,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FAST: tl.constexpr,
    RANGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dk and dv of a block of keys, summed over the query heads of its GQA group. Scores are
    transposed: P^T and dz^T are left operands of the next products."""
    i_block, i_kv, i_b = program(blocks, heads // group)
    first = i_block * BLOCK_N
    sequence = sequence_of(
        cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k, longest_q, longest_k, i_b
    )
    if first >= sequence.k_length:
        return
    o_j = first + tl.arange(0, BLOCK_N)
    keys = slice_of(k, i_b, i_kv, sequence.k_start, sequence.k_length)
    b_k = load_rows(keys, o_j, HEAD_DIM, BLOCK_D)
    values = slice_of(v, i_b, i_kv, sequence.k_start, sequence.k_length)
    b_v = load_rows(values, o_j, VALUE_DIM, BLOCK_V)

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    last = tl.minimum(first + BLOCK_N, sequence.k_length) - 1
    # Key j is seen by queries j - diagonal - right to j - diagonal + left.
    band = visible_parts(
        first, last, -sequence.diagonal, window.right, window.left, sequence.q_length, BLOCK_M
    )
    width = COUNTS + tl.cdiv(longest_q, BLOCK_M)
    p_list = list_of(
        lists, width, cu_seqlens_k, i_b, i_kv, blocks, first, sequence.k_start, BLOCK_N
    )
    parts = listed_parts(p_list, band)
    ENTRY: tl.constexpr = BLOCK_M if lists.data is None else 1
    for PART in tl.static_range(1 if window.right is None or p_list is not None else 0, 3):
        # One loop over heads and their query blocks, so that loads are pipelined across heads.
        count = tl.cdiv(parts[PART + 1] - parts[PART], ENTRY)
        for n in range(group * count):
            i_h = i_kv * group + n // count
            head = head_of(terms, i_b, i_h, sequence.k_length, KIND)
            queries = slice_of(q, i_b, i_h, sequence.q_start, sequence.q_length)
            douts = slice_of(dout, i_b, i_h, sequence.q_start, sequence.q_length)
            o_row = statistics_of(cu_seqlens_q, i_b, i_h, heads, tokens_q, sequence.q_start)
            entry = parts[PART] + n % count * ENTRY
            o_i = first_of(p_list, width, entry, PART, BLOCK_M) + tl.arange(0, BLOCK_M)
            b_q = load_rows(queries, o_i, HEAD_DIM, BLOCK_D)
            b_dout = load_rows(douts, o_i, VALUE_DIM, BLOCK_V)
            m_i = o_i < sequence.q_length
            b_norm = norm_of(lse, o_row + o_i, m_i, head, KIND, NORMALIZE)
            b_delta = delta_of(delta, o_row + o_i, m_i, KIND, NORMALIZE)
            # S^T = K Q^T, dP^T = V dO^T
            b_qk = dot(b_k, tl.trans(b_q))
            b_dp = dot(b_v, tl.trans(b_dout))
            m_seen = None
            if PART != 1:
                rules = rules_of(mask, i_b, i_h, sequence, tokens_q, tokens_k, RANGES)
                m_seen = seen(o_i[None, :], o_j[:, None], sequence, window, rules, RANGES)
            b_p, b_dz = gradients(
                b_qk,
                b_dp,
                o_i[None, :],
                o_j[:, None],
                b_norm[None, :],
                b_delta[None, :],
                terms,
                head,
                sequence,
                m_seen,
                KIND,
                NORMALIZE,
                FAST,
            )
            if KIND == "sigmoid" and b_q.dtype == tl.float16:
                b_p *= FLOAT16_SCALE
            # dV += P^T dO, dK += dz^T Q
            b_dv += weighted(b_p, b_dout, KIND)
            b_dk += weighted(through_softcap(b_dz, b_qk, terms), b_q, KIND)

    if KIND == "sigmoid" and b_k.dtype == tl.float16:
        b_dv *= 1.0 / FLOAT16_SCALE
    dks = slice_of(dk, i_b, i_kv, sequence.k_start, sequence.k_length)
    store_rows(dks, o_j, b_dk * terms.scale, HEAD_DIM)
    dvs = slice_of(dv, i_b, i_kv, sequence.k_start, sequence.k_length)
    store_rows(dvs, o_j, b_dv, VALUE_DIM)


@triton.jit(
    do_not_specialize=[
        *LENGTHS,
        "bias_heads",
        "bias_rows",
        "bias_columns",
        "sum_batch",
        "sum_heads",
    ]
)
def bias_kernel(
    dout,
    lse,
    delta,
    q,
    k,
    v,
    dbias,
    bias_heads,
    bias_rows,
    bias_columns,
    sum_batch,
    sum_heads,
    terms,
    window,
    mask,
    cu_seqlens_q,
    cu_seqlens_k,
    tokens_q,
    tokens_k,
    longest_q,
    longest_k,
    heads,
    group,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FAST: tl.constexpr,
    RANGES: tl.constexpr,
    SUM_Q: tl.constexpr,
    SUM_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A tile of dbias [B|1, H|1, rows, columns]: dz summed, in order, over the broadcast
    dimensions: sum_batch sequences, sum_heads heads, all queries if SUM_Q, all keys if SUM_K."""
    blocks_k = tl.cdiv(bias_columns, BLOCK_N)
    i_tile, i_bias_h, i_bias_b = program(tl.cdiv(bias_rows, BLOCK_M) * blocks_k, bias_heads)
    first_i = i_tile // blocks_k * BLOCK_M
    first_j = i_tile % blocks_k * BLOCK_N
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_b in range(i_bias_b, i_bias_b + sum_batch):
        sequence = sequence_of(
            cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k, longest_q, longest_k, i_b
        )
        stop_i = sequence.q_length
        if not SUM_Q:
            stop_i = tl.minimum(first_i + BLOCK_M, stop_i)
        for i_h in range(i_bias_h, i_bias_h + sum_heads):
            head = head_of(terms, i_b, i_h, sequence.k_length, KIND)
            rules = rules_of(mask, i_b, i_h, sequence, tokens_q, tokens_k, RANGES)
            queries = slice_of(q, i_b, i_h, sequence.q_start, sequence.q_length)
            douts = slice_of(dout, i_b, i_h, sequence.q_start, sequence.q_length)
            keys = slice_of(k, i_b, i_h // group, sequence.k_start, sequence.k_length)
            values = slice_of(v, i_b, i_h // group, sequence.k_start, sequence.k_length)
            o_row = statistics_of(cu_seqlens_q, i_b, i_h, heads, tokens_q, sequence.q_start)
            for i in range(first_i, stop_i, BLOCK_M):
                o_i = i + tl.arange(0, BLOCK_M)
                b_q = load_rows(queries, o_i, HEAD_DIM, BLOCK_D)
                b_dout = load_rows(douts, o_i, VALUE_DIM, BLOCK_V)
                m_i = o_i < sequence.q_length
                b_norm = norm_of(lse, o_row + o_i, m_i, head, KIND, NORMALIZE)
                b_delta = delta_of(delta, o_row + o_i, m_i, KIND, NORMALIZE)
                last = tl.minimum(i + BLOCK_M, sequence.q_length) - 1
                parts = visible_parts(
                    i,
                    last,
                    sequence.diagonal,
                    window.left,
                    window.right,
                    sequence.k_length,
                    BLOCK_N,
                )
                begin = parts[0]
                stop_j = parts[3]
                if not SUM_K:
                    begin = tl.maximum(begin, first_j)
                    stop_j = tl.minimum(first_j + BLOCK_N, stop_j)
                    if mask.ranges is not None or mask.q_spans is not None:
                        o_j = first_j + tl.arange(0, BLOCK_N)
                        m_seen = seen(o_i[:, None], o_j[None, :], sequence, window, rules, RANGES)
                        m_row = tl.max(m_seen.to(tl.int32), 1)
                        stop_j = tl.where(tl.max(m_row, 0) != 0, stop_j, begin)
                for j in range(begin, stop_j, BLOCK_N):
                    o_j = j + tl.arange(0, BLOCK_N)
                    b_k = load_rows(keys, o_j, HEAD_DIM, BLOCK_D)
                    b_v = load_rows(values, o_j, VALUE_DIM, BLOCK_V)
                    m_seen = seen(o_i[:, None], o_j[None, :], sequence, window, rules, RANGES)
                    # dbias += dz, with S = Q K^T and dP = dO V^T
                    _, b_dz = gradients(
                        dot(b_q, tl.trans(b_k)),
                        dot(b_dout, tl.trans(b_v)),
                        o_i[:, None],
                        o_j[None, :],
                        b_norm[:, None],
                        b_delta[:, None],
                        terms,
                        head,
                        sequence,
                        m_seen,
                        KIND,
                        NORMALIZE,
                        FAST,
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
