"""Forward: one program owns a block of queries of one head and streams over its keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common import (
    INF,
    LENGTHS,
    LOG2E,
    NONE,
    SOFTMAX,
    STEP,
    STEP_COLUMNS,
    Lengths,
    Sequence,
    fade_of,
    head_of,
    load_tile,
    query_block,
    row_offsets,
    rows_of_nan,
    slice_of,
    split_values,
    statistics_of,
    store_rows,
    store_tile,
)
from ..weights import FLOAT16_SCALE, exponential, inverse, weighted, weights
from .kv_cache import CACHE_LENGTHS, LONG, Source, cache_of, length_of, scored_tile
from .masks import first_of, key_walk, rules_of, seen


class Sums(NamedTuple):
    """Accumulators of a block of rows, relative to e^top for softmax, and their rounding errors."""

    acc: Any  # weighted values, [BLOCK_M, BLOCK_V]
    acc_lost: Any
    sum: Any  # of weights, [BLOCK_M]
    sum_lost: Any
    top: Any  # row_max, [BLOCK_M]


@triton.jit
def add(b_sum, b_lost, b_x):
    """Kahan-compensated sum: b_lost is the rounding error added in excess."""
    b_y = b_x - b_lost
    b_total = b_sum + b_y
    return b_total, (b_total - b_sum) - b_y


@triton.jit
def add_values(b_p, b_v, b_acc, b_acc_lost, KIND: tl.constexpr):
    """O += P V, compensated in float32."""
    if KIND == "sigmoid" and b_v.dtype == tl.float16:
        b_p *= FLOAT16_SCALE
    b_pv = weighted(b_p, b_v, KIND)
    if b_v.dtype == tl.float32:
        b_acc, b_acc_lost = add(b_acc, b_acc_lost, b_pv)
    else:
        b_acc += b_pv
    return b_acc, b_acc_lost


@triton.jit
def no_sums(BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    return Sums(b_acc, b_acc, b_sum, b_sum, tl.full([BLOCK_M], -INF, tl.float32))


@triton.jit
def accumulate(
    sums, b_z, b_v, head, KIND: tl.constexpr = SOFTMAX, NORMALIZE: tl.constexpr = NONE,
    FAST: tl.constexpr = False, b_fade=None,
):  # fmt: skip
    """Adds a tile of keys to the sums of its rows. The row sum of softmax is taken before post-sum
    decay. normalize="count" counts keys instead."""
    b_acc, b_acc_lost, b_sum, b_sum_lost, b_top = sums
    if KIND == "softmax":
        # row_max, P = exp(z - row_max), rescale by exp(m_old - m_new)
        b_new_top = tl.maximum(b_top, tl.max(b_z, 1))
        b_row_max = tl.where(b_new_top == -INF, 0.0, b_new_top)
        b_p = exponential(b_z - b_row_max[:, None], head)
        # row_sum = row_sum exp(m_old - m_new) + rowsum(P)
        b_shrink = exponential(b_top - b_row_max, head)
        b_top = b_new_top
        b_sum, b_sum_lost = add(b_sum * b_shrink, b_sum_lost * b_shrink, tl.sum(b_p, 1))
        # rescale O by exp(m_old - m_new)
        b_acc *= b_shrink[:, None]
        b_acc_lost *= b_shrink[:, None]
        if b_fade is not None:
            b_p *= b_fade
    else:
        b_p, _ = weights(b_z, head, KIND, FAST)
        if NORMALIZE == "sum":
            b_sum, b_sum_lost = add(b_sum, b_sum_lost, tl.sum(b_p, 1))
        elif NORMALIZE == "count":
            b_sum += tl.sum(tl.where(b_z == -INF, 0.0, 1.0), 1)
    b_acc, b_acc_lost = add_values(b_p, b_v, b_acc, b_acc_lost, KIND)
    return Sums(b_acc, b_acc_lost, b_sum, b_sum_lost, b_top)


@triton.jit
def accumulate_seen(
    b_z, b_v, b_acc, b_acc_lost, b_top, head, KIND: tl.constexpr = SOFTMAX,
    FAST: tl.constexpr = False, b_fade=None,
):  # fmt: skip
    """O += P V with weights relative to the final row_max. Skips keys whose score is -inf, and keys
    whose relu weight is 0."""
    if KIND == "softmax":
        b_row_max = tl.where(b_top == -INF, 0.0, b_top)
        b_p = exponential(b_z - b_row_max[:, None], head)
        if b_fade is not None:
            b_p *= b_fade
    else:
        b_p, _ = weights(b_z, head, KIND, FAST)
    m_seen = b_z != -INF
    if b_fade is not None:
        m_seen = m_seen & (b_fade != 0.0)
    if KIND == "relu":  # zero relu weights mask their values
        m_seen = b_p != 0.0
    b_v, b_rest = split_values(b_v, m_seen)
    if KIND == "linear":  # the sign of an infinite result would depend on the sign of the weight
        b_rest = tl.where(b_rest == 0.0, 0.0, float("nan"))
    b_acc, b_acc_lost = add_values(b_p, b_v, b_acc + b_rest, b_acc_lost, KIND)
    return b_acc, tl.where(b_acc_lost == b_acc_lost, b_acc_lost, 0.0)  # NaN from inf - inf


@triton.jit
def normaliser(b_top, b_sum, b_sink, head):
    """Factor of an accumulator relative to e^row_max, and the row's lse. b_sink: None, or a logit
    without a value."""
    b_row_max = b_top
    if b_sink is not None:
        b_score = (b_sink - head.shift) * (LOG2E / head.log2e)
        b_row_max = tl.maximum(b_top, b_score)
    b_row_max = tl.where(b_row_max == -INF, 0.0, b_row_max)
    b_factor = exponential(b_top - b_row_max, head)
    b_total = b_sum * b_factor
    b_base = b_row_max * (head.log2e / LOG2E) + head.shift
    if b_sink is not None:
        b_total += tl.where(b_score == b_row_max, 1.0, exponential(b_score - b_row_max, head))
        # lse is exactly the sink where the keys have no weight.
        b_base = tl.where(b_score > b_top, b_sink, b_base)
    m_empty = b_total == 0.0
    b_lse = b_base + tl.log(tl.where(m_empty, 1.0, b_total))
    return b_factor / tl.where(m_empty, 1.0, b_total), tl.where(m_empty, -INF, b_lse)


@triton.jit
def unscaled(b_sum, dtype: tl.constexpr, KIND: tl.constexpr, NORMALIZE: tl.constexpr):
    """Output factor of a row for kinds other than softmax."""
    b_factor = tl.full(b_sum.shape, 1.0, tl.float32)
    if NORMALIZE != "none":
        b_factor = inverse(b_sum, KIND, NORMALIZE)
    if KIND == "sigmoid" and dtype == tl.float16:
        b_factor *= 1.0 / FLOAT16_SCALE
    return b_factor


@triton.jit
def cached(sequence, cache, i_b):
    """Sequence of a request whose keys are in a cache."""
    length = length_of(cache.seqlens, cache.capacity, i_b)
    return Sequence(sequence.q_start, sequence.q_length, 0, length, length - sequence.q_length)


@triton.jit
def source_of(store, cache, i_b, i_kv, sequence):
    """Keys and values of one KV head of a sequence."""
    if cache is None:
        k = slice_of(store.k, i_b, i_kv, sequence.k_start, sequence.k_length)
        v = slice_of(store.v, i_b, i_kv, sequence.k_start, sequence.k_length)
    else:
        k, v = cache.k, cache.v
    return Source(cache, k, v, i_b, i_kv)


@triton.jit(do_not_specialize=[*LENGTHS, *CACHE_LENGTHS])
def attention_kernel(
    q, store, out, lse, sink, lists, terms, window, mask, cu_seqlens,
    table_stride, pages, capacity,
    tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks,
    C,
):  # fmt: skip
    lengths = Lengths(tokens_q, tokens_k, longest_q, longest_k, heads, group, blocks)
    block, sequence = query_block(cu_seqlens, lengths, heads, C.BLOCK_M)
    i_b, i_h = block.i_b, block.i_h
    if block.first >= sequence.q_length:
        return
    cache = None
    if store.seqlens is not None:
        cache = cache_of(store, table_stride, pages, capacity)
        sequence = cached(sequence, cache, i_b)
    head = head_of(terms, i_b, i_h, sequence.k_length, C.KIND)
    rules = rules_of(mask, i_b, i_h, sequence, tokens_q, tokens_k, C.RANGES)
    source = source_of(store, cache, i_b, i_h // group, sequence)
    o_i = block.first + tl.arange(0, C.BLOCK_M)
    queries = slice_of(q, i_b, i_h, sequence.q_start, sequence.q_length)
    m_q = o_i < queries.length
    b_q = queries.data + row_offsets(queries, o_i)  # pointers, if HEAD_DIM > LONG
    if C.HEAD_DIM <= LONG:
        b_q = load_tile(b_q, m_q, C.HEAD_DIM, C.BLOCK_D)

    sums = no_sums(C.BLOCK_M, C.BLOCK_V)
    walk = key_walk(lists, window, cu_seqlens, lengths, block, sequence, C)
    ENTRY: tl.constexpr = C.BLOCK_N if lists.data is None else 1
    MASKED: tl.constexpr = mask.ranges is not None or mask.q_spans is not None
    for PART in tl.static_range(1 if window.left is None or lists.data is not None else 0, 3):
        for n in range(walk.parts[PART], walk.parts[PART + 1], ENTRY):
            o_j = first_of(walk, n, PART, C.BLOCK_N) + tl.arange(0, C.BLOCK_N)
            b_z, b_v = scored_tile(
                b_q, m_q, source, o_i[:, None], o_j, terms, head, sequence, C, C.BLOCK_V
            )
            if PART != 1 or (cache is not None and MASKED):
                m_seen = seen(o_i[:, None], o_j[None, :], sequence, window, rules, C.RANGES)
                b_z = tl.where(m_seen, b_z, -INF)
            # online softmax, O += P V
            b_fade = fade_of(o_i[:, None], o_j[None, :], terms, head, sequence)
            sums = accumulate(sums, b_z, b_v, head, C.KIND, C.NORMALIZE, C.FAST, b_fade)

    b_sum = sums.sum
    if C.KIND == "softmax":
        b_sink = None
        if sink is not None:
            b_sink = tl.load(sink + i_h)
        b_factor, b_sum = normaliser(sums.top, b_sum, b_sink, head)
    else:
        WEIGHTS: tl.constexpr = (
            tl.float32 if store.v.data.dtype.element_ty == tl.uint8 else q.data.dtype.element_ty
        )
        b_factor = unscaled(b_sum, WEIGHTS, C.KIND, C.NORMALIZE)
    if C.KIND == "softmax" or C.NORMALIZE != "none":
        o_row = statistics_of(cu_seqlens.q, i_b, i_h, heads, tokens_q, sequence.q_start)
        tl.store(lse + o_row + o_i, b_sum, mask=m_q)
    outs = slice_of(out, i_b, i_h, sequence.q_start, sequence.q_length)
    # O = O / row_sum
    b_out = sums.acc * b_factor[:, None]
    store_rows(outs, o_i, b_out, C.VALUE_DIM)

    HIDES: tl.constexpr = (
        window.left is not None or window.right is not None or lists.data is not None or MASKED
    )
    # recompute rows that are NaN because a masked value is not finite
    if HIDES or C.KIND == "relu":
        m_again = rows_of_nan(b_out) & m_q
        if tl.max(m_again.to(tl.int32), 0) != 0:
            COLUMNS: tl.constexpr = min(C.BLOCK_V, STEP_COLUMNS)
            for c in tl.range(0, C.VALUE_DIM, COLUMNS, num_stages=1):
                b_y = tl.zeros([C.BLOCK_M, COLUMNS], tl.float32)
                b_y_lost = tl.zeros([C.BLOCK_M, COLUMNS], tl.float32)
                for j in tl.range(walk.band[0], walk.band[3], STEP, num_stages=1):
                    o_j = j + tl.arange(0, STEP)
                    b_z, b_v = scored_tile(
                        b_q, m_q, source, o_i[:, None], o_j, terms, head, sequence, C, COLUMNS, c
                    )
                    m_seen = seen(o_i[:, None], o_j[None, :], sequence, window, rules, C.RANGES)
                    b_z = tl.where(m_seen, b_z, -INF)
                    b_fade = fade_of(o_i[:, None], o_j[None, :], terms, head, sequence)
                    # O += P V over visible keys
                    b_y, b_y_lost = accumulate_seen(
                        b_z, b_v, b_y, b_y_lost, sums.top, head, C.KIND, C.FAST, b_fade
                    )
                p_out = outs.data + row_offsets(outs, o_i)
                store_tile(p_out, m_again, b_y * b_factor[:, None], C.VALUE_DIM, c)
