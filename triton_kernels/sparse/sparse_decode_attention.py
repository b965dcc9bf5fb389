"""sparse_decode_attention: the attention_decode engine on key rows that lists assemble.

Row r of a list head is query r // group of head r % group. Scores are in bits.
A value that a query does not see has weight 0, but 0 times a non-finite value is NaN. With several
queries, the first launch flags each program that has a NaN row, and a second launch recomputes such
rows per query, from the values that each sees.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._call.operator import record_of
from tokenmill._kv_cache import capacity

from ..common import (
    FAR,
    INF,
    INTERPRETED,
    LOG2E,
    MAX_REGISTERS,
    STEP,
    Sequence,
    head_of,
    launch,
    load_tile,
    program,
    row_pointers,
    rows_of_nan,
    scores,
    terms_of,
)
from ..dense.attention_decode import Tile, tile_of
from ..dense.attention_decode_merge import merge, new_partials, rows_of, store_partials
from ..dense.attention_decode_schedule import decode_program, range_of, splits_of
from ..dense.attention_forward import accumulate, add, no_sums
from ..dense.kv_cache import (
    LONG,
    Cache,
    held,
    offsets_of,
    scale_of,
    scaled,
    value_parts,
)
from .blocks import rows_from
from .key_rows import (
    NOWHERE,
    Places,
    Rope,
    find,
    key_row,
    load_columns,
    load_turned,
    long_products,
    places_of,
    products,
)

# Arguments excluded from specialization: a new length does not recompile.
SIZES = ["indices_batch", "indices_head", "counts_batch", "counts_head", "entries", "num_sink"]
SIZES += ["num_recent", "seqlen_q", "extra_count", "table_stride", "pages", "capacity"]
SIZES += ["log_count_batch", "log_count_head", "positions", "batch", "row_heads", "shared", "group"]
SIZES += ["rows", "row_blocks", "splits", "halvings", "maximum", "blocks"]


@triton.jit
def seen(o_j, o_t, o_query, num_recent, row):
    """Visibility of key o_j at place o_t. A listed key among the recent tokens counts as recent.
    NOWHERE exceeds every query position."""
    m_recent = o_j > o_query - num_recent
    return (o_j <= o_query) & (m_recent == (o_t >= row.list_end))


@triton.jit(do_not_specialize=SIZES)
def sparse_ranges_kernel(
    q, k, v, seqlens, block_table, table_stride, pages, capacity, k_scale, v_scale, indices, counts,
    indices_batch, indices_head, counts_batch, counts_head, entries, halvings, num_sink, num_recent,
    rope, positions, extra_k, extra_v, extra_count, log_count, log_count_batch, log_count_head,
    partials, nan, logits, terms, batch, row_heads, shared, group, seqlen_q, rows, row_blocks,
    splits, caches, starts,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BY_PLACE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """Query rows over a range of keys. logits [B, row heads, rows, entries, BLOCK_K], if requested:
    scores of listed keys. nan, for several queries: flag per program that a row is NaN. AGAIN:
    recomputes those rows for one query, from the keys it sees. caches: cache index per request;
    None: its own. starts: first key of each request in packed keys."""
    i = tl.program_id(0)
    query = None
    if AGAIN:
        query = i % seqlen_q
        i = i // seqlen_q
        if tl.load(nan + i) == 0:
            return
    STEP_N: tl.constexpr = STEP if AGAIN else BLOCK_N
    i_split, i_block, i_h, i_b = decode_program(i, splits, row_blocks, row_heads)
    if starts is not None:
        start = tl.load(starts + i_b)
        k, v = rows_from(k, 0, start), rows_from(v, 0, start)
    cache = Cache(k, v, seqlens, block_table, table_stride, pages, capacity, k_scale, v_scale)
    o_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    o_partial = ((i_split * batch + i_b) * row_heads + i_h) * rows + o_row
    if AGAIN:
        m_row = m_row & (o_row // group == query)
        p_out = partials.outs + o_partial * VALUE_DIM
        m_row = rows_of_nan(load_tile(p_out, m_row, VALUE_DIM, BLOCK_V))
    row = key_row(
        indices, counts, indices_batch, indices_head, counts_batch, counts_head, entries, halvings,
        seqlens, capacity, num_sink, num_recent, seqlen_q, extra_count, i_b, i_h, BLOCK_K,
    )  # fmt: skip
    first, last = range_of(0, row.total, splits, i_split, BLOCK_N)
    sequence = Sequence(0, seqlen_q, 0, row.length, row.length - seqlen_q)
    i_kv = i_h // shared

    o_i = o_row // group
    o_head = i_h * group + tl.where(m_row, o_row % group, 0)
    head = head_of(terms, i_b, o_head, row.length)
    o_query = o_i + sequence.diagonal
    p_q = row_pointers(q, i_b, o_i, o_head)
    o_turn_q = tl.zeros_like(o_query) + row.cached - 1 if BY_PLACE else o_query
    queries = Places(p_q, m_row, None, None)
    # Rotated columns of long rows; the remaining columns are multiplied in pieces.
    COLUMNS: tl.constexpr = 2 * PAIRS if HEAD_DIM > LONG else HEAD_DIM
    b_q = load_turned(
        queries, o_turn_q, rope, positions, COLUMNS, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R,
        q.data.dtype.element_ty,
    )  # fmt: skip

    sums = no_sums(BLOCK_M, BLOCK_V)
    i_cache = i_b
    if caches is not None:
        i_cache = tl.load(caches + i_b).to(tl.int64)
    # Prefetch one step ahead: a key's address comes from two dependent loads.
    o_j, o_page = find(row, cache, i_cache, first + tl.arange(0, STEP_N), BLOCK_K, PAGE_SIZE)
    for t in range(first, last, STEP_N):
        o_t = t + tl.arange(0, STEP_N)
        if AGAIN:
            m_seen = seen(o_j, o_t, query + sequence.diagonal, num_recent, row)
            o_j = tl.where(m_seen, o_j, NOWHERE)
        keys = places_of(cache.k, extra_k, row, cache, i_b, i_kv, o_t, o_j, o_page, PAGE_SIZE)
        values = places_of(cache.v, extra_v, row, cache, i_b, i_kv, o_t, o_j, o_page, PAGE_SIZE)
        o_turn_k = o_t if BY_PLACE else o_j
        b_k = load_turned(
            keys, o_turn_k, rope, positions, COLUMNS, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R,
            q.data.dtype.element_ty,
        )  # fmt: skip
        o_value = tl.arange(0, BLOCK_V)
        b_v = load_columns(values, o_value, o_value < VALUE_DIM, tl.float32)
        # S = Q K^T, times k_scale
        if COLUMNS > 0:
            b_qk = products(b_q, b_k, COLUMNS, PAIRS)
        else:
            b_qk = tl.zeros([BLOCK_M, STEP_N], tl.float32)
        if HEAD_DIM > LONG:
            b_qk += long_products(queries, keys, COLUMNS, HEAD_DIM, q.data.dtype.element_ty)
        if k_scale is not None:
            p_scale = k_scale.data + offsets_of(k_scale, cache, o_page, o_j, i_kv, PAGE_SIZE)
            b_qk = scaled(b_qk, tl.load(p_scale, mask=keys.m_row, other=1.0))
        if v_scale is not None:
            p_scale = v_scale.data + offsets_of(v_scale, cache, o_page, o_j, i_kv, PAGE_SIZE)
            b_v = b_v * tl.load(p_scale, mask=keys.m_row, other=1.0)[:, None]
        b_z = scores(b_qk, o_i[:, None], o_t[None, :], terms, head, sequence)
        if log_count is not None:
            p_count = log_count + i_b * log_count_batch + i_kv.to(tl.int64) * log_count_head
            b_count = tl.load(p_count + (o_t - row.cached), mask=keys.m_extra, other=0.0)
            b_z += (b_count * LOG2E)[None, :]
        m_seen = seen(o_j[None, :], o_t[None, :], o_query[:, None], num_recent, row)
        b_z = tl.where(m_seen | keys.m_extra[None, :], b_z, -INF)
        if logits is not None:
            o_logit = (row.first.to(tl.int64) * BLOCK_K + (o_t - row.sinks))[None, :]
            i_rows = (i_b * row_heads + i_h) * rows
            p_logit = logits + (i_rows + o_row)[:, None] * entries * BLOCK_K + o_logit
            m_list = (o_t >= row.sinks) & (o_t < row.list_end)
            tl.store(p_logit, b_z, mask=m_row[:, None] & m_list[None, :])
        # online softmax, O += P V
        sums = accumulate(sums, b_z, b_v, head)
        o_j, o_page = find(row, cache, i_cache, o_t + STEP_N, BLOCK_K, PAGE_SIZE)

    store_partials(partials, o_partial, m_row, sums, VALUE_DIM)
    if nan is not None and not AGAIN:
        m_nan = rows_of_nan(sums.acc) & m_row
        tl.store(nan + i, tl.max(m_nan.to(tl.int32), 0))


@triton.jit(do_not_specialize=SIZES)
def mass_kernel(
    logits, scales, mass, seqlens, capacity, indices, counts, indices_batch, indices_head,
    counts_batch, counts_head, entries, halvings, num_sink, num_recent, seqlen_q, row_heads, rows,
    maximum, blocks,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Probability mass of BLOCK_E list entries, summed over all rows in order."""
    i_block, i_h, i_b = program(blocks, row_heads)
    row = key_row(
        indices, counts, indices_batch, indices_head, counts_batch, counts_head, entries, halvings,
        seqlens, capacity, num_sink, num_recent, seqlen_q, 0, i_b, i_h, BLOCK_K,
    )  # fmt: skip
    o_entry = i_block * BLOCK_E + tl.arange(0, BLOCK_E)
    m_entry = (o_entry >= row.first) & (o_entry < row.last)
    o_logit = o_entry.to(tl.int64)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    b_mass = tl.zeros([BLOCK_E], tl.float32)
    b_lost = tl.zeros([BLOCK_E], tl.float32)
    i_head = i_b * row_heads + i_h
    for r in range(rows):
        i_x = i_head * rows + r
        p_logit = logits + i_x * entries * BLOCK_K + o_logit
        b_z = tl.load(p_logit, mask=m_entry[:, None], other=-INF)
        # P = 2^(z - row_max) factor
        b_p = tl.exp2(b_z - tl.load(scales + i_x)) * tl.load(scales + maximum + i_x)
        b_mass, b_lost = add(b_mass, b_lost, tl.sum(b_p, 1))
    tl.store(mass + i_head * entries + o_entry, b_mass, mask=o_entry < entries)


Arguments: Any = record_of("sparse_decode_attention")


class Call(Arguments):
    """A call, and the kernel arguments derived from it."""

    @property
    def row_heads(self) -> int:
        """Number of heads with separate rows of keys: KV heads, or query heads if each has its own
        list."""
        one_list_each = self.indices.shape[1] > self.k_cache.shape[2]
        return self.q.shape[2] if one_list_each else self.k_cache.shape[2]

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.row_heads

    @property
    def rows(self) -> int:
        """Query rows of a row head."""
        return self.group * self.q.shape[1]

    @property
    def capacity(self) -> int:
        return capacity(self.k_cache, self.block_table)

    @property
    def extra_count(self) -> int:
        return 0 if self.extra_k is None else self.extra_k.shape[1]

    @property
    def longest(self) -> int:
        """Maximum number of keys of a row."""
        listed = self.num_sink + self.indices.shape[2] * self.block_k + self.num_recent
        return min(listed + self.q.shape[1], FAR) + self.extra_count

    @property
    def pairs(self) -> int:
        return 0 if self.cos is None else self.cos.shape[1]

    def tile(self) -> Tile:
        tile = tile_of(self.q, self.v_cache, self.rows, self.longest)
        if INTERPRETED.value:
            return tile
        # Key addressing and rotation take registers.
        head_dim = self.q.shape[3]
        partly = 0 < 2 * self.pairs < head_dim
        tile = tile._replace(keys=max(tile.keys // (4 if partly else 2), 16))
        float8 = self.v_cache.element_size() == 1  # float8 values are accumulated from float32
        if partly and (self.q.dtype == torch.float32 or float8):
            return tile._replace(warps=8, stages=1)
        if self.interleaved and head_dim > 128:
            return tile._replace(warps=8)
        return tile

    def lists(self) -> tuple[Any, ...]:
        """Kernel arguments from indices to num_recent."""
        one_list, entries = self.indices.shape[1] == 1, self.indices.shape[2]
        return (
            self.indices,
            self.counts,
            self.indices.stride(0),
            0 if one_list else self.indices.stride(1),
            self.counts.stride(0),
            0 if one_list else self.counts.stride(1),
            entries,
            entries.bit_length(),
            min(self.num_sink, self.capacity),
            min(self.num_recent, self.capacity),
        )

    def inputs(self) -> tuple[Any, ...]:
        """Kernel arguments from q to log_count_head."""
        table, cos, sin, log_count = self.block_table, self.cos, self.sin, self.extra_log_count
        return (
            rows_of(self.q),
            rows_of(held(self.k_cache)),
            rows_of(held(self.v_cache)),
            self.seqlens_k,
            table,
            0 if table is None else table.stride(0),
            self.k_cache.shape[0],
            self.capacity,
            scale_of(self.k_scale),
            scale_of(self.v_scale),
            *self.lists(),
            None if cos is None else Rope(cos, sin, cos.stride(0), sin.stride(0)),
            0 if cos is None else cos.shape[0],
            None if self.extra_k is None else rows_of(self.extra_k),
            None if self.extra_v is None else rows_of(self.extra_v),
            self.extra_count,
            log_count,
            0 if log_count is None else log_count.stride(0),
            0 if log_count is None else log_count.stride(1),
        )

    def options(self, tile: Tile) -> dict[str, Any]:
        head_dim, value_dim = self.q.shape[3], self.v_cache.shape[3]
        rest = min(head_dim, LONG.value) - 2 * self.pairs
        return {
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "PAGE_SIZE": 1 if self.block_table is None else self.k_cache.shape[1],
            "BLOCK_K": self.block_k,
            "PAIRS": self.pairs,
            "INTERLEAVED": self.interleaved,
            "BY_PLACE": self.pos_mode == "cache",
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "BLOCK_P": max(triton.next_power_of_2(self.pairs), 16),
            "BLOCK_R": max(triton.next_power_of_2(rest), 16),
            "BLOCK_V": max(triton.next_power_of_2(value_dim), 16),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def sparse_decode_attention(
    a: Any, caches: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """caches: int32 [B], cache or block_table row that each request reads; None: its own. starts:
    int32 [B], first key of each request in a cache [1, S, Hk, D] shared by all."""
    if len(parts := value_parts(a.v_cache)) > 1:
        extra_parts = [None] * len(parts)
        if a.extra_v is not None:
            extra_parts = a.extra_v.split(parts[0].shape[3], -1)
        results = [
            sparse_decode_attention(
                a._replace(
                    v_cache=part, extra_v=extra, return_mass=a.return_mass and part is parts[0]
                ),
                caches,
                starts,
            )
            for part, extra in zip(parts, extra_parts, strict=True)
        ]
        return torch.cat([out for out, *_ in results], -1), *results[0][1:]
    call = Call._make(a)
    (batch, seqlen_q, heads, _), entries = a.q.shape, a.indices.shape[2]
    row_heads = call.row_heads
    out = a.q.new_empty((batch, seqlen_q, heads, a.v_cache.shape[3]))
    lse = a.q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    shape = (batch, row_heads, entries) if a.return_mass else (0,)
    if out.numel() == 0:
        return out, lse, a.q.new_zeros(shape, dtype=torch.float32)
    mass = a.q.new_empty(shape, dtype=torch.float32)
    rows, tile = call.rows, call.tile()
    row_blocks = triton.cdiv(rows, tile.rows)
    splits = splits_of(a.q, a.num_splits, batch * row_heads * row_blocks, call.longest)
    partials = new_partials(a.q, splits, batch, row_heads, rows, value_dim=a.v_cache.shape[3])
    maximum = batch * row_heads * rows
    logits, scales = None, None
    if mass.numel() > 0:
        logits = a.q.new_empty((maximum, entries * a.block_k), dtype=torch.float32)
        scales = a.q.new_empty((2, maximum), dtype=torch.float32)
    terms = terms_of(a.scale, a.softcap, 0.0, False, None, None)
    programs = batch * row_heads * row_blocks * splits
    nan = None
    if seqlen_q > 1:  # a single query sees every key of its row
        nan = a.q.new_empty(programs, dtype=torch.int32)
    shared = row_heads // a.k_cache.shape[2]
    sizes = (batch, row_heads, shared, call.group, seqlen_q, rows, row_blocks, splits)
    arguments = (a.q, *call.inputs(), partials, nan)
    after = (terms, *sizes, caches, starts)
    options = call.options(tile)
    launch(sparse_ranges_kernel, programs, *arguments, logits, *after, **options, AGAIN=False)
    if nan is not None:  # one program per query
        options |= {"AGAIN": True, "maxnreg": MAX_REGISTERS}
        launch(sparse_ranges_kernel, programs * seqlen_q, *arguments, None, *after, **options)
    merge(partials, a.seqlens_k, call.capacity, out, lse, scales, a.sink, terms, call.group)
    if logits is not None:
        block_e = max((1 << 14 if INTERPRETED.value else 1024) // a.block_k, 1)
        blocks = triton.cdiv(entries, block_e)
        launch(
            mass_kernel, batch * row_heads * blocks, a.q, logits, scales, mass, a.seqlens_k,
            call.capacity, *call.lists(), seqlen_q, row_heads, rows, maximum, blocks,
            BLOCK_K=a.block_k, BLOCK_E=block_e, num_warps=4,
        )  # fmt: skip
    return out, lse, mass
