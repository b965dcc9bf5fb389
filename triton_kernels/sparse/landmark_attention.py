"""landmark_attention: one program owns a tile of queries of one head and streams over key tiles
that hold whole blocks, each padded to a power of two of columns. Scores of ordinary keys in an
earlier block get l - lse added, with l the score of the block's landmark and lse over its ordinary
keys; the rest is causal attention without landmarks. For a block of several tiles, a separate pass
computes its lse. Scores are in bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._call.operator import record_of

from ..common import (
    INF,
    INTERPRETED,
    MAX_REGISTERS,
    STEP_COLUMNS,
    architecture,
    dot,
    head_of,
    launch,
    load_rows,
    program,
    row_offsets,
    rows_of_nan,
    scores,
    slice_of,
    store_rows,
    store_tile,
    terms_of,
)
from ..dense.attention import LARGE_PLANS, PLANS, Plan, Tiles, plan_of, tile_options
from ..dense.attention_decode_merge import rows_of
from ..dense.attention_forward import accumulate, accumulate_seen, no_sums, normaliser

SIZES = ["tokens", "block", "heads", "group", "tiles"]  # excluded from specialization


class Shape(NamedTuple):
    """Compile-time choices."""

    HEAD_DIM: tl.constexpr
    VALUE_DIM: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_V: tl.constexpr
    NB: tl.constexpr  # blocks per key tile
    LONG: tl.constexpr  # a block spans several tiles


class Queries(NamedTuple):
    """Tile of queries of one head."""

    b_q: Any
    b_dout: Any  # None in the forward
    o_i: Any
    last: Any  # last query


class Blocks(NamedTuple):
    """Keys and values of a head in blocks, and what scores them."""

    k: Any
    v: Any  # not `values`, an attribute of Triton's tuples
    terms: Any
    head: Any
    tokens: Any
    block: Any


class Columns(NamedTuple):
    """Keys of a tile: NB adjacent blocks, or a part of one block."""

    o_j: Any  # position, or the number of tokens for a padding column
    o_block: Any
    m_ordinary: Any
    m_landmark: Any


class Statistics(NamedTuple):
    """Per-block statistics [BLOCK_M, NB] over ordinary keys: row_max, and relative to it row_sum of
    weights and of weights times dP; and the landmark's score."""

    b_top: Any
    b_sum: Any
    b_mean: Any
    b_landmark: Any


@triton.jit
def columns_of(first_block, part, block, tokens, shape):
    o_c = tl.arange(0, shape.BLOCK_N)
    WIDTH: tl.constexpr = shape.BLOCK_N // shape.NB
    o_block = first_block + o_c // WIDTH
    o_in = part * shape.BLOCK_N + o_c % WIDTH
    o_j = tl.where(o_in < block, o_block * block + o_in, tokens)
    o_j = tl.minimum(o_j, tokens)
    return Columns(o_j, o_block, (o_in < block - 1) & (o_j < tokens), o_in == block - 1)


@triton.jit
def spread(b_x, BLOCK_N: tl.constexpr):
    """Broadcasts a value per block to the columns of the block: [BLOCK_M, BLOCK_N]."""
    M: tl.constexpr = b_x.shape[0]
    NB: tl.constexpr = b_x.shape[1]
    b_wide = tl.broadcast_to(b_x[:, :, None], [M, NB, BLOCK_N // NB])
    return tl.reshape(b_wide, [M, BLOCK_N])


@triton.jit
def blockwise(b_x, NB: tl.constexpr):
    return tl.reshape(b_x, [b_x.shape[0], NB, b_x.shape[1] // NB])


@triton.jit
def no_statistics(M: tl.constexpr, NB: tl.constexpr):
    b_zero = tl.zeros([M, NB], tl.float32)
    return Statistics(b_zero - INF, b_zero, b_zero, b_zero - INF)


@triton.jit
def add_statistics(found, b_z, b_dp, columns, NB: tl.constexpr):
    """Online update of the block statistics with a tile. b_dp is None in the forward."""
    N: tl.constexpr = b_z.shape[1]
    b_w = tl.where(columns.m_ordinary[None, :], b_z, -INF)
    # block softmax: row_max, rescale by exp2(m_old - m_new), row_sum
    b_top = tl.maximum(found.b_top, tl.max(blockwise(b_w, NB), 2))
    b_base = tl.where(b_top == -INF, 0.0, b_top)
    b_e = tl.exp2(b_w - spread(b_base, N))
    b_shrink = tl.exp2(found.b_top - b_base)
    b_sum = found.b_sum * b_shrink + tl.sum(blockwise(b_e, NB), 2)
    b_mean = found.b_mean
    if b_dp is not None:
        b_seen = tl.where(columns.m_ordinary[None, :], b_e * b_dp, 0.0)
        b_mean = found.b_mean * b_shrink + tl.sum(blockwise(b_seen, NB), 2)
    b_l = tl.where(columns.m_landmark[None, :], b_z, -INF)
    b_landmark = tl.maximum(found.b_landmark, tl.max(blockwise(b_l, NB), 2))
    return Statistics(b_top, b_sum, b_mean, b_landmark)


@triton.jit
def gate_of(found):
    """Term added to the scores of an earlier block: l - lse."""
    b_top = tl.where(found.b_top == -INF, 0.0, found.b_top)
    return found.b_landmark - b_top - tl.log2(tl.where(found.b_sum == 0.0, 1.0, found.b_sum))


@triton.jit
def seen_keys(o_i, columns, block):
    """Mask of columns in earlier blocks, and mask of visible columns."""
    o_own = (o_i // block)[:, None]
    m_earlier = columns.o_block[None, :] < o_own
    m_own = (columns.o_block[None, :] == o_own) & (columns.o_j[None, :] <= o_i[:, None])
    return m_earlier, (m_earlier | m_own) & columns.m_ordinary[None, :]


@triton.jit
def queries_of(q, dout, i_b, i_h, first, tokens, shape):
    o_i = first + tl.arange(0, shape.BLOCK_M)
    b_q = load_rows(slice_of(q, i_b, i_h, 0, tokens), o_i, shape.HEAD_DIM, shape.BLOCK_D)
    b_dout = None
    if dout is not None:
        douts = slice_of(dout, i_b, i_h, 0, tokens)
        b_dout = load_rows(douts, o_i, shape.VALUE_DIM, shape.BLOCK_V)
    return Queries(b_q, b_dout, o_i, tl.minimum(first + shape.BLOCK_M, tokens) - 1)


@triton.jit
def blocks_of(k, v, terms, head, tokens, block, i_b, i_kv):
    keys = slice_of(k, i_b, i_kv, 0, tokens)
    values = slice_of(v, i_b, i_kv, 0, tokens)
    return Blocks(keys, values, terms, head, tokens, block)


@triton.jit
def values_at(columns, tokens):
    """Value rows of a tile; landmarks have no value row."""
    return tl.where(columns.m_ordinary, columns.o_j, tokens)


@triton.jit
def part_scores(queries, blocks, first_block, part, shape):
    columns = columns_of(first_block, part, blocks.block, blocks.tokens, shape)
    b_k = load_rows(blocks.k, columns.o_j, shape.HEAD_DIM, shape.BLOCK_D)
    # S = Q K^T
    b_qk = dot(queries.b_q, tl.trans(b_k))
    o_j = columns.o_j[None, :]
    return columns, scores(b_qk, queries.o_i[:, None], o_j, blocks.terms, blocks.head, None)


@triton.jit
def block_statistics(queries, blocks, first_block, parts, shape):
    """Statistics of a block that spans several tiles, for the queries after it; none for other
    blocks."""
    found = no_statistics(shape.BLOCK_M, shape.NB)
    if shape.LONG:
        seen = first_block < queries.last // blocks.block
        if seen:
            for part in range(parts):
                columns, b_z = part_scores(queries, blocks, first_block, part, shape)
                b_dp = None
                if queries.b_dout is not None:
                    o_v = values_at(columns, blocks.tokens)
                    b_v = load_rows(blocks.v, o_v, shape.VALUE_DIM, shape.BLOCK_V)
                    b_dp = dot(queries.b_dout, tl.trans(b_v))
                found = add_statistics(found, b_z, b_dp, columns, shape.NB)
    return found


@triton.jit
def weighed_scores(found, queries, blocks, first_block, part, shape):
    """Gated scores of a tile, for causal attention, and its value rows. found: statistics of a
    block that spans several tiles."""
    columns, b_z = part_scores(queries, blocks, first_block, part, shape)
    if not shape.LONG:
        found = add_statistics(found, b_z, None, columns, shape.NB)
    m_earlier, m_seen = seen_keys(queries.o_i, columns, blocks.block)
    # z += l - lse for earlier blocks
    b_z += tl.where(m_earlier, spread(gate_of(found), shape.BLOCK_N), 0.0)
    return tl.where(m_seen, b_z, -INF), values_at(columns, blocks.tokens)


@triton.jit
def parts_seen(first_block, last, block, shape):
    """Number of tiles of a block visible to queries up to `last`."""
    parts = 1
    if shape.LONG:
        parts = tl.cdiv(tl.minimum(block, last + 1 - first_block * block), shape.BLOCK_N)
    return parts


@triton.jit(do_not_specialize=SIZES)
def landmark_kernel(q, k, v, out, lse, terms, tokens, block, heads, group, tiles, shape):
    i_tile, i_h, i_b = program(tiles, heads)
    # Reversed tile order: the last queries have most keys, so they start first.
    first = (tiles - 1 - i_tile) * shape.BLOCK_M
    head = head_of(terms, i_b, i_h, tokens)
    blocks = blocks_of(k, v, terms, head, tokens, block, i_b, i_h // group)
    queries = queries_of(q, None, i_b, i_h, first, tokens, shape)
    o_i = queries.o_i
    last = queries.last

    sums = no_sums(shape.BLOCK_M, shape.BLOCK_V)
    for first_block in range(0, last // block + 1, shape.NB):
        parts = parts_seen(first_block, last, block, shape)
        found = block_statistics(queries, blocks, first_block, parts, shape)
        for part in range(parts):
            b_z, o_v = weighed_scores(found, queries, blocks, first_block, part, shape)
            b_v = load_rows(blocks.v, o_v, shape.VALUE_DIM, shape.BLOCK_V)
            # online softmax, O += P V
            sums = accumulate(sums, b_z, b_v, head)

    b_factor, b_lse = normaliser(sums.top, sums.sum, None, head)
    o_row = (i_b * heads + i_h) * tokens + o_i
    tl.store(lse + o_row, b_lse, mask=o_i < tokens)
    # O = O / row_sum
    outs = slice_of(out, i_b, i_h, 0, tokens)
    b_acc = sums.acc * b_factor[:, None]
    store_rows(outs, o_i, b_acc, shape.VALUE_DIM)

    # recompute rows that are NaN because a masked value is not finite
    m_again = rows_of_nan(b_acc) & (o_i < tokens)
    if tl.max(m_again.to(tl.int32), 0) != 0:
        COLUMNS: tl.constexpr = min(shape.BLOCK_V, STEP_COLUMNS)
        for c in tl.range(0, shape.VALUE_DIM, COLUMNS, num_stages=1):
            b_y = tl.zeros([shape.BLOCK_M, COLUMNS], tl.float32)
            b_y_lost = tl.zeros([shape.BLOCK_M, COLUMNS], tl.float32)
            for first_block in range(0, last // block + 1, shape.NB):
                parts = parts_seen(first_block, last, block, shape)
                found = block_statistics(queries, blocks, first_block, parts, shape)
                for part in range(parts):
                    b_z, o_v = weighed_scores(found, queries, blocks, first_block, part, shape)
                    b_v = load_rows(blocks.v, o_v, shape.VALUE_DIM, COLUMNS, c)
                    b_y, b_y_lost = accumulate_seen(b_z, b_v, b_y, b_y_lost, sums.top, head)
            p_out = outs.data + row_offsets(outs, o_i)
            store_tile(p_out, m_again, b_y * b_factor[:, None], shape.VALUE_DIM, c)


def _half(tiles: Tiles) -> Tiles:
    return tiles._replace(block_m=max(tiles.block_m // 2, 16))


Arguments: Any = record_of("landmark_attention")


class Call(Arguments):
    """A call, and the kernel arguments derived from it."""

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    @property
    def keys_of_block(self) -> int:
        """Block length, clamped to tokens + 1 so that block ends do not overflow."""
        return min(self.block, self.tokens + 1)

    def plan(self) -> Plan:
        if INTERPRETED.value:  # a tile costs milliseconds whatever its size
            return Plan(*[Tiles(64, 64, 4, 1)] * 3)
        # Block statistics take the registers of half a tile or more.
        dim = max(self.q.shape[-1], self.v.shape[-1])
        minimum = plan_of(PLANS, self.q, self.v.shape[-1], True)
        large = 90 <= architecture(self.q) < 120
        plan = plan_of(LARGE_PLANS, self.q, self.v.shape[-1], True) if large else minimum
        if dim <= 64 or self.q.element_size() == 4:
            return plan._replace(keys=_half(minimum.keys))
        return plan._replace(queries=_half(plan.queries)) if dim > 128 else plan

    def blocks(self, tiles: Tiles) -> int:
        """Blocks per key tile: a power of two."""
        return max(tiles.block_n // triton.next_power_of_2(self.keys_of_block), 1)

    def arguments(self, tiles: int) -> tuple[Any, ...]:
        """Arguments common to all kernels, from terms to tiles."""
        terms, heads = terms_of(self.scale, 0.0, 0.0, False, None, None), self.q.shape[2]
        return terms, self.tokens, self.keys_of_block, heads, heads // self.k.shape[2], tiles

    def options(self, tiles: Tiles) -> dict[str, Any]:
        """Compile-time choices and launch options of a kernel."""
        options = tile_options(tiles, self.q.shape[-1], self.v.shape[-1])
        choices = [options.pop(name) for name in Shape._fields if name in options]
        choices += [self.blocks(tiles), self.keys_of_block > tiles.block_n]
        shape = Shape._make(map(tl.constexpr, choices))
        return {"shape": shape, **options, "maxnreg": MAX_REGISTERS}


def landmark_attention(a: Any) -> tuple[Tensor, Tensor]:
    call = Call._make(a)
    batch, tokens, heads = call.q.shape[:3]
    out = call.q.new_empty((batch, tokens, heads, call.v.shape[3]))
    lse = call.q.new_empty((batch, heads, tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    plan = call.plan().forward
    tiles = triton.cdiv(tokens, plan.block_m)
    launch(
        landmark_kernel, batch * heads * tiles, call.q,
        *map(rows_of, (call.q, call.k, call.v, out)), lse, *call.arguments(tiles),
        **call.options(plan),
    )  # fmt: skip
    return out, lse
