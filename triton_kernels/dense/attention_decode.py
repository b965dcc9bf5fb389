"""attention_decode: one program owns a range of keys of one KV head for all query rows of its GQA
group, or several such ranges (stream-K); a second kernel merges the ranges of each row in order.
Row r of a KV head is query r // group of head r % group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._kv_cache import capacity
from tokenmill.dense.terms import has_row_statistic

from ..common import (
    INF,
    INTERPRETED,
    STEP,
    Sequence,
    head_of,
    launch,
    load_tile,
    row_pointers,
    rows_of_nan,
    scores,
    store_tile,
    terms_of,
    window_of,
)
from .attention import attention_cached
from .attention_decode_merge import merge, new_partials, rows_of, store_partials
from .attention_decode_schedule import (
    NO_STREAM,
    SIZES,
    Stream,
    all_steps,
    decode_program,
    longest_share,
    output_of,
    range_of,
    share_of,
    splits_of,
    steps_of,
    stream_of,
    visible_begin,
)
from .attention_forward import accumulate, accumulate_seen
from .kv_cache import (
    LONG,
    Cache,
    held,
    key_products,
    length_of,
    load_keys,
    long_products,
    scale_of,
    value_parts,
    value_rows,
)
from .masks import (
    LISTED,
    allowed,
    list_reached,
    mask_of,
    ranges_in,
    reach_of,
    reached_span,
    rules_of,
)


@triton.jit
def seen_tile(
    b_q, m_q, cache, i_b, i_kv, o_i, m_i, o_j, terms, head, sequence, window, rules,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Scores of keys o_j, -inf where masked, and their values. b_q: queries, or pointers to rows
    m_q if HEAD_DIM > LONG."""
    m_j = o_j < sequence.k_length
    b_v = load_keys(cache.v, cache, i_b, i_kv, o_j, m_j, VALUE_DIM, BLOCK_V, PAGE_SIZE)
    b_v = value_rows(b_v, cache, i_b, i_kv, o_j, m_j, PAGE_SIZE)
    o_key = o_j[None, :]
    # S = Q K^T
    if HEAD_DIM > LONG:
        b_qk = long_products(b_q, m_q, cache, i_b, i_kv, o_j, m_j, HEAD_DIM, PAGE_SIZE)
    else:
        b_k = load_keys(cache.k, cache, i_b, i_kv, o_j, m_j, HEAD_DIM, BLOCK_D, PAGE_SIZE)
        b_qk = key_products(b_q, b_k, cache, i_b, i_kv, o_j, m_j, PAGE_SIZE)
    b_z = scores(b_qk, o_i, o_key, terms, head, sequence)
    m_seen = (o_key < sequence.k_length) & (o_key <= o_i + sequence.diagonal)
    if window.left is not None:
        m_seen = m_seen & (o_key >= o_i + (sequence.diagonal - window.left))
    m_seen = allowed(m_seen, o_i, o_key, m_i, m_j[None, :], rules, RANGES)
    return tl.where(m_seen, b_z, -INF), b_v


@triton.jit
def rows_in(i_block, i_kv, group, rows, BLOCK_M: tl.constexpr):
    """Mask of the existing rows of a block, their queries and heads."""
    o_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    return m_row, o_row // group, i_kv * group + tl.where(m_row, o_row % group, 0)


@triton.jit
def sum_range(
    q, cache, partials, o_partial, terms, window, mask, mask_keys, p_list,
    sequence, first, last, i_block, i_kv, i_b, group, rows,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, RANGES: tl.constexpr, HIDES: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Accumulates keys first .. last - 1 for a block of rows and stores the partial results."""
    m_row, o_i, o_h = rows_in(i_block, i_kv, group, rows, BLOCK_M)
    b_q = row_pointers(q, i_b, o_i, o_h)
    if HEAD_DIM <= LONG:
        b_q = load_tile(b_q, m_row, HEAD_DIM, BLOCK_D)
    o_i = o_i[:, None]
    m_i = m_row[:, None]
    head = head_of(terms, i_b, o_h[:, None], sequence.k_length, KIND)
    rules = rules_of(mask, i_b, o_h[:, None], sequence, sequence.q_length, mask_keys, RANGES)
    entry = first
    entries = last
    if p_list is not None:
        reach = reach_of(rules, o_i, m_i, RANGES)
        entry = first - first
        entries = list_reached(p_list, first, last, rules, reach, BLOCK_N, TILES)

    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_acc_lost = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_sum_lost = tl.zeros([BLOCK_M], tl.float32)
    b_top = tl.full([BLOCK_M], -INF, tl.float32)
    for n in range(entry, entries, BLOCK_N if p_list is None else 1):
        j = n
        if p_list is not None:
            j = tl.load(p_list + n)
        o_j = j + tl.arange(0, BLOCK_N)
        b_z, b_v = seen_tile(
            b_q, m_row, cache, i_b, i_kv, o_i, m_i, o_j, terms, head, sequence, window, rules,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PAGE_SIZE, RANGES,
        )  # fmt: skip
        # online softmax, O += P V
        b_acc, b_acc_lost, b_sum, b_sum_lost, b_top = accumulate(
            b_z, b_v, b_acc, b_acc_lost, b_sum, b_sum_lost, b_top, head, KIND, NORMALIZE
        )
    store_partials(partials, o_partial, m_row, b_acc, b_sum, b_top, VALUE_DIM, KIND, NORMALIZE)

    if HIDES:
        # recompute rows that are NaN because a masked value is not finite
        m_again = rows_of_nan(b_acc) & m_row
        if tl.max(m_again.to(tl.int32), 0) != 0:
            b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            b_acc_lost = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            for j in tl.range(first, last, STEP, num_stages=1):
                o_j = j + tl.arange(0, STEP)
                b_z, b_v = seen_tile(
                    b_q, m_row, cache, i_b, i_kv, o_i, m_i, o_j, terms, head, sequence, window,
                    rules,
                    HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PAGE_SIZE, RANGES,
                )  # fmt: skip
                b_acc, b_acc_lost = accumulate_seen(b_z, b_v, b_acc, b_acc_lost, b_top, head, KIND)
            store_tile(partials.outs + o_partial * VALUE_DIM, m_again, b_acc, VALUE_DIM)


@triton.jit(do_not_specialize=SIZES)
def ranges_kernel(
    q,
    k,
    v,
    seqlens,
    block_table,
    table_stride,
    pages,
    capacity,
    k_scale,
    v_scale,
    partials,
    terms,
    window,
    mask,
    mask_keys,
    lists,
    list_width,
    batch,
    kv_heads,
    group,
    seqlen_q,
    rows,
    row_blocks,
    splits,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RANGES: tl.constexpr,
    HIDES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    cache = Cache(k, v, seqlens, block_table, table_stride, pages, capacity, k_scale, v_scale)
    i_split, i_block, i_kv, i_b = decode_program(tl.program_id(0), splits, row_blocks, kv_heads)
    length = length_of(seqlens, capacity, i_b)
    sequence = Sequence(0, seqlen_q, 0, length, length - seqlen_q)
    begin = visible_begin(sequence, window.left)
    first, last = range_of(begin, length, splits, i_split, BLOCK_N)
    if mask.ranges is not None:
        m_row, o_i, o_h = rows_in(i_block, i_kv, group, rows, BLOCK_M)
        rules = rules_of(mask, i_b, o_h[:, None], sequence, sequence.q_length, mask_keys, RANGES)
        reach = reach_of(rules, o_i[:, None], m_row[:, None], RANGES)
        begin, end = reached_span(begin, length, reach)
        first, last = range_of(begin, end, splits, i_split, BLOCK_N)
    p_list = None
    if lists is not None:
        p_list = lists + tl.program_id(0).to(tl.int64) * list_width
    o_first = ((i_split * batch + i_b) * kv_heads + i_kv) * rows
    o_partial = o_first + (i_block * BLOCK_M + tl.arange(0, BLOCK_M))
    sum_range(
        q, cache, partials, o_partial, terms, window, mask, mask_keys, p_list,
        sequence, first, last, i_block, i_kv, i_b, group, rows,
        HEAD_DIM, VALUE_DIM, PAGE_SIZE, KIND, NORMALIZE, RANGES, HIDES, TILES,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def stream_kernel(
    q,
    k,
    v,
    seqlens,
    block_table,
    table_stride,
    pages,
    capacity,
    k_scale,
    v_scale,
    partials,
    terms,
    window,
    mask,
    mask_keys,
    lists,
    list_width,
    counts,
    batch,
    tiles,
    programs,
    minimum,
    halvings,
    group,
    seqlen_q,
    rows,
    row_blocks,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RANGES: tl.constexpr,
    HIDES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Stream-K: the parts of output tiles in this program's share of steps."""
    cache = Cache(k, v, seqlens, block_table, table_stride, pages, capacity, k_scale, v_scale)
    stream = Stream(counts, batch, tiles, programs, minimum)
    i_program = tl.program_id(0)
    begin = i_program * share_of(stream)
    end = tl.minimum(begin + share_of(stream), all_steps(stream))
    if begin >= end:
        return
    last_output = output_of(stream, end - 1, halvings)
    for i_output in range(output_of(stream, begin, halvings), last_output + 1):
        i_b = tl.cast(i_output // stream.tiles, tl.int64)
        i_tile = i_output % stream.tiles
        first_step, steps = steps_of(stream, i_output)
        step = tl.maximum(begin - first_step, 0)
        length = length_of(seqlens, capacity, i_b)
        sequence = Sequence(0, seqlen_q, 0, length, length - seqlen_q)
        first_key = visible_begin(sequence, window.left)
        first = first_key + step * BLOCK_N
        last = tl.minimum(first_key + tl.minimum(end - first_step, steps) * BLOCK_N, length)
        p_list = None
        if lists is not None:  # after the lists of this program's earlier tiles
            p_list = lists + i_program.to(tl.int64) * list_width + (first_step + step - begin)
        o_partial = (i_output + i_program).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        sum_range(
            q, cache, partials, o_partial, terms, window, mask, mask_keys, p_list,
            sequence, first, last, i_tile % row_blocks, i_tile // row_blocks, i_b, group, rows,
            HEAD_DIM, VALUE_DIM, PAGE_SIZE, KIND, NORMALIZE, RANGES, HIDES, TILES,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip


# Keyed by (element size in bytes, head_dim): keys per step, warps, stages.
TILES = {
    (2, 64): (128, 4, 2),
    (2, 128): (64, 4, 2),
    (2, 256): (32, 4, 2),
    (4, 64): (64, 4, 2),
    (4, 128): (32, 4, 2),
    (4, 256): (16, 4, 1),
}


class Tile(NamedTuple):
    """Rows and keys per step, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_of(q: Tensor, v: Tensor, rows: int, longest: int) -> Tile:
    """longest: maximum number of keys of a row. float8 values are multiplied in float32."""
    wide = min(triton.next_power_of_2(max(64, q.shape[3], v.shape[3])), LONG.value)
    size = 4 if v.element_size() == 1 else q.element_size()
    keys, warps, stages = TILES[size, wide]
    if INTERPRETED.value:  # a tile costs milliseconds whatever its size
        keys = min(max(triton.next_power_of_2(longest) // 16, 32), 1024)
    maximum = 16
    if size == 2:
        maximum = 64 if wide <= 128 else 32
    block = min(max(triton.next_power_of_2(rows), 16), maximum)
    # Four warps would spill.
    if wide == 256 and (block == 32 or v.element_size() == 1):
        warps = 8
    return Tile(block, keys, warps, stages)


def attention_decode(a: Any) -> tuple[Tensor, Tensor]:
    if len(parts := value_parts(a.v_cache)) > 1:
        results = [attention_decode(a._replace(v_cache=part)) for part in parts]
        return torch.cat([out for out, _ in results], -1), results[0][1]
    if a.cu_seqlens_q is not None or (not a.causal and a.window_right != 0):
        return attention_cached(a)
    q, k, v = a.q, a.k_cache, a.v_cache
    batch, seqlen_q, heads, head_dim = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[3]
    out = q.new_empty((batch, seqlen_q, heads, value_dim))
    statistic = has_row_statistic(a.kind, a.normalize)
    lse = q.new_empty((batch, heads, seqlen_q) if statistic else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    group = heads // kv_heads
    rows = group * seqlen_q
    maximum = capacity(k, a.block_table)
    tile = tile_of(q, v, rows, maximum)
    row_blocks = triton.cdiv(rows, tile.rows)
    terms = terms_of(
        a.scale, a.softcap, a.score_bias_value, a.score_bias_neg_log_n, a.score_bias,
        a.alibi_slopes, kind=a.kind,
    )  # fmt: skip
    window = window_of(a.window_left, 0)
    mask = mask_of(a.mask_ranges, a.mask_q_spans, a.mask_k_spans)
    masked = mask.ranges is not None or mask.q_spans is not None
    tiles = kv_heads * row_blocks
    stream = NO_STREAM
    if a.schedule == "stream_k":
        stream = stream_of(q, a.seqlens_k, maximum, window, tiles, tile.keys)
        programs = stream.programs
        partials = new_partials(q, batch * tiles + programs, tile.rows, value_dim=value_dim)
        steps = longest_share(stream, maximum, tile.keys)
        sizes: tuple[Any, ...] = (*stream, batch.bit_length(), group, seqlen_q, rows, row_blocks)
    else:
        splits = splits_of(q, a.num_splits, batch * tiles, maximum)
        programs = batch * tiles * splits
        partials = new_partials(q, splits, batch, kv_heads, rows, value_dim=value_dim)
        steps = triton.cdiv(triton.cdiv(maximum, tile.keys), splits)
        sizes = (batch, kv_heads, group, seqlen_q, rows, row_blocks, splits)
    launch(
        ranges_kernel if stream.counts is None else stream_kernel,
        programs,
        q,
        rows_of(q),
        rows_of(held(k)),
        rows_of(held(v)),
        a.seqlens_k,
        a.block_table,
        0 if a.block_table is None else a.block_table.stride(0),
        k.shape[0],
        maximum,
        scale_of(a.k_scale),
        scale_of(a.v_scale),
        partials,
        terms,
        window,
        mask,
        0 if a.mask_k_spans is None else a.mask_k_spans.shape[1],
        q.new_empty((programs, steps), dtype=torch.int32) if masked else None,
        steps,
        *sizes,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        PAGE_SIZE=1 if a.block_table is None else k.shape[1],
        KIND=a.kind,
        NORMALIZE=a.normalize,
        RANGES=ranges_in(a.mask_ranges),
        # A single query sees every key of its range unless a mask is given.
        HIDES=seqlen_q > 1 or a.kind == "relu" or masked,
        TILES=max(LISTED // tile.keys, 1),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        BLOCK_V=max(triton.next_power_of_2(value_dim), 16),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    merge(
        partials, a.seqlens_k, maximum, out, lse, None, a.sink, terms, group, stream, a.kind,
        a.normalize, weights_of=torch.float32 if v.element_size() == 1 else q.dtype,
    )  # fmt: skip
    return out, lse
