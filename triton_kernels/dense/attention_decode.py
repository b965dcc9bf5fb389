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

from tokenmill._check import check
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
    store_tile,
    terms_of,
    window_of,
)
from .attention import Tiles, attention_cached, choice_options, store_of
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
from .attention_forward import accumulate, accumulate_seen, no_sums
from .kv_cache import LONG, Source, cache_of, length_of, scored_tile, value_parts
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


class RowBlock(NamedTuple):
    """A block of rows of one KV head of a request."""

    m_row: Any
    o_i: Any  # query
    o_h: Any  # head
    i_kv: Any
    i_b: Any


@triton.jit
def rows_in(i_block, i_kv, i_b, group, rows, BLOCK_M: tl.constexpr):
    o_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    o_h = i_kv * group + tl.where(m_row, o_row % group, 0)
    return RowBlock(m_row, o_row // group, o_h, i_kv, i_b)


@triton.jit
def request_of(cache, seqlen_q, i_b):
    """The sequence of a request."""
    length = length_of(cache.seqlens, cache.capacity, i_b)
    return Sequence(0, seqlen_q, 0, length, length - seqlen_q)


@triton.jit
def seen_tile(b_q, source, block, o_j, terms, head, sequence, window, rules, C):
    """Scores of keys o_j, -inf where masked, and their values."""
    o_i = block.o_i[:, None]
    b_z, b_v = scored_tile(b_q, block.m_row, source, o_i, o_j, terms, head, sequence, C, C.BLOCK_V)
    o_key = o_j[None, :]
    m_key = o_key < sequence.k_length
    m_seen = m_key & (o_key <= o_i + sequence.diagonal)
    if window.left is not None:
        m_seen = m_seen & (o_key >= o_i + (sequence.diagonal - window.left))
    m_seen = allowed(m_seen, o_i, o_key, block.m_row[:, None], m_key, rules, C.RANGES)
    return tl.where(m_seen, b_z, -INF), b_v


@triton.jit
def sum_range(
    q, cache, partials, o_partial, terms, window, mask, mask_keys, p_list,
    sequence, first, last, block, C, HIDES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Accumulates keys first .. last - 1 for a block of rows and stores the partial results."""
    o_h = block.o_h[:, None]
    b_q = row_pointers(q, block.i_b, block.o_i, block.o_h)  # pointers, if HEAD_DIM > LONG
    if C.HEAD_DIM <= LONG:
        b_q = load_tile(b_q, block.m_row, C.HEAD_DIM, C.BLOCK_D)
    source = Source(cache, cache.k, cache.v, block.i_b, block.i_kv)
    head = head_of(terms, block.i_b, o_h, sequence.k_length, C.KIND)
    rules = rules_of(mask, block.i_b, o_h, sequence, sequence.q_length, mask_keys, C.RANGES)
    entry = first
    entries = last
    if p_list is not None:
        reach = reach_of(rules, block.o_i[:, None], block.m_row[:, None], C.RANGES)
        entry = first - first
        entries = list_reached(p_list, first, last, rules, reach, C.BLOCK_N, TILES)

    sums = no_sums(C.BLOCK_M, C.BLOCK_V)
    for n in range(entry, entries, C.BLOCK_N if p_list is None else 1):
        j = n
        if p_list is not None:
            j = tl.load(p_list + n)
        o_j = j + tl.arange(0, C.BLOCK_N)
        b_z, b_v = seen_tile(b_q, source, block, o_j, terms, head, sequence, window, rules, C)
        # online softmax, O += P V
        sums = accumulate(sums, b_z, b_v, head, C.KIND, C.NORMALIZE)
    store_partials(partials, o_partial, block.m_row, sums, C.VALUE_DIM, C.KIND, C.NORMALIZE)

    if HIDES:
        # recompute rows that are NaN because a masked value is not finite
        m_again = rows_of_nan(sums.acc) & block.m_row
        if tl.max(m_again.to(tl.int32), 0) != 0:
            b_acc = tl.zeros([C.BLOCK_M, C.BLOCK_V], tl.float32)
            b_acc_lost = tl.zeros([C.BLOCK_M, C.BLOCK_V], tl.float32)
            for j in tl.range(first, last, STEP, num_stages=1):
                o_j = j + tl.arange(0, STEP)
                b_z, b_v = seen_tile(
                    b_q, source, block, o_j, terms, head, sequence, window, rules, C
                )
                b_acc, b_acc_lost = accumulate_seen(
                    b_z, b_v, b_acc, b_acc_lost, sums.top, head, C.KIND
                )
            store_tile(partials.outs + o_partial * C.VALUE_DIM, m_again, b_acc, C.VALUE_DIM)


@triton.jit(do_not_specialize=SIZES)
def ranges_kernel(
    q, store, table_stride, pages, capacity, partials, terms, window, mask, mask_keys,
    lists, list_width, batch, kv_heads, group, seqlen_q, rows, row_blocks, splits,
    C, HIDES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    cache = cache_of(store, table_stride, pages, capacity)
    i_split, i_block, i_kv, i_b = decode_program(tl.program_id(0), splits, row_blocks, kv_heads)
    sequence = request_of(cache, seqlen_q, i_b)
    block = rows_in(i_block, i_kv, i_b, group, rows, C.BLOCK_M)
    begin = visible_begin(sequence, window.left)
    end = sequence.k_length
    if mask.ranges is not None:
        o_h = block.o_h[:, None]
        rules = rules_of(mask, i_b, o_h, sequence, sequence.q_length, mask_keys, C.RANGES)
        reach = reach_of(rules, block.o_i[:, None], block.m_row[:, None], C.RANGES)
        begin, end = reached_span(begin, end, reach)
    first, last = range_of(begin, end, splits, i_split, C.BLOCK_N)
    p_list = None
    if lists is not None:
        p_list = lists + tl.program_id(0).to(tl.int64) * list_width
    o_first = ((i_split * batch + i_b) * kv_heads + i_kv) * rows
    o_partial = o_first + (i_block * C.BLOCK_M + tl.arange(0, C.BLOCK_M))
    sum_range(
        q, cache, partials, o_partial, terms, window, mask, mask_keys, p_list,
        sequence, first, last, block, C, HIDES, TILES,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def stream_kernel(
    q, store, table_stride, pages, capacity, partials, terms, window, mask, mask_keys,
    lists, list_width, counts, batch, tiles, programs, minimum, halvings,
    group, seqlen_q, rows, row_blocks,
    C, HIDES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Stream-K: the parts of output tiles in this program's share of steps."""
    cache = cache_of(store, table_stride, pages, capacity)
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
        sequence = request_of(cache, seqlen_q, i_b)
        block = rows_in(i_tile % row_blocks, i_tile // row_blocks, i_b, group, rows, C.BLOCK_M)
        first_key = visible_begin(sequence, window.left)
        first = first_key + step * C.BLOCK_N
        last_key = first_key + tl.minimum(end - first_step, steps) * C.BLOCK_N
        p_list = None
        if lists is not None:  # after the lists of this program's earlier tiles
            p_list = lists + i_program.to(tl.int64) * list_width + (first_step + step - begin)
        o_partial = (i_output + i_program).to(tl.int64) * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
        sum_range(
            q, cache, partials, o_partial, terms, window, mask, mask_keys, p_list,
            sequence, first, tl.minimum(last_key, sequence.k_length), block, C, HIDES, TILES,
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
    check(not a.invariant, "attention_decode", "invariant", "must be False on a GPU", a.invariant)
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
    store, cache_lengths = store_of(a)
    maximum = cache_lengths[-1]
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
        store,
        *cache_lengths,
        partials,
        terms,
        window,
        mask,
        0 if a.mask_k_spans is None else a.mask_k_spans.shape[1],
        q.new_empty((programs, steps), dtype=torch.int32) if masked else None,
        steps,
        *sizes,
        # A single query sees every key of its range unless a mask is given.
        HIDES=seqlen_q > 1 or a.kind == "relu" or masked,
        TILES=max(LISTED // tile.keys, 1),
        **choice_options(
            Tiles(*tile),
            head_dim,
            value_dim,
            KIND=a.kind,
            NORMALIZE=a.normalize,
            FAST=False,
            RANGES=ranges_in(a.mask_ranges),
            PAGE_SIZE=1 if a.block_table is None else k.shape[1],
        ),
    )
    merge(
        partials, a.seqlens_k, maximum, out, lse, None, a.sink, terms, group, stream, a.kind,
        a.normalize, weights_of=torch.float32 if v.element_size() == 1 else q.dtype,
    )  # fmt: skip
    return out, lse
