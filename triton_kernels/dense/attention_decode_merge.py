"""Partial results of key ranges, and the kernel that merges them for each row, in order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    INF,
    INTERPRETED,
    NONE,
    SOFTMAX,
    Rows,
    Terms,
    head_of,
    launch,
    row_pointers,
    store_tile,
)
from ..weights import exponential
from .attention_decode_schedule import NO_STREAM, SIZES, Stream, share_of, steps_of
from .attention_forward import normaliser, unscaled
from .kv_cache import length_of

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Partials(NamedTuple):
    """Partial results [splits, B, Hk, rows] or [ranges, rows of a tile]: weighted values, row_sum
    and row_max."""

    outs: Tensor  # not `values`: Triton tuples have an attribute of that name
    sums: Tensor
    tops: Tensor


@triton.jit
def store_partials(
    partials, o_partial, m_row, sums, VALUE_DIM: tl.constexpr,
    KIND: tl.constexpr = SOFTMAX, NORMALIZE: tl.constexpr = NONE,
):  # fmt: skip
    store_tile(partials.outs + o_partial * VALUE_DIM, m_row, sums.acc, VALUE_DIM)
    if KIND == "softmax" or NORMALIZE != "none":
        tl.store(partials.sums + o_partial, sums.sum, mask=m_row)
    if KIND == "softmax":
        tl.store(partials.tops + o_partial, sums.top, mask=m_row)


@triton.jit
def load_part(p_part, m_part, other):
    """m_part None: no row is masked."""
    if m_part is None:
        b_part = tl.load(p_part)
    else:
        b_part = tl.load(p_part, mask=m_part, other=other)
    return b_part


@triton.jit
def ranges_of(stream, o_x, rows, kv_heads, BLOCK_M: tl.constexpr):
    """Offsets of the first partial of rows o_x, and their number of ranges. Partial o + i belongs
    to output tile o and program i: consecutive ranges differ in program, tile, or both."""
    o_row = o_x % rows
    o_output = o_x // rows * (stream.tiles // kv_heads) + o_row // BLOCK_M
    b_first, b_count = steps_of(stream, o_output)
    share = share_of(stream)
    b_program = b_first // share
    o_range = (o_output + b_program).to(tl.int64)
    return o_range * BLOCK_M + o_row % BLOCK_M, (b_first + b_count - 1) // share - b_program + 1


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partials, seqlens, capacity, out, lse, scales, sink, terms,
    counts, batch, tiles, programs, minimum, heads, group, seqlen_q, splits, maximum,
    VALUE_DIM: tl.constexpr, KIND: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Merges rows o_x of most = B Hk rows. 32-bit offsets, because 64-bit division is a function
    call. scales [2, most] if requested: row_max and factor of each row, so that a score z has
    probability 2^(z - row_max) factor."""
    o_x = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_x = o_x < maximum
    rows = group * seqlen_q
    o_x = tl.where(m_x, o_x, 0)
    o_i = o_x % rows // group
    o_h = o_x // rows % (heads // group) * group + o_x % group
    o_b = (o_x // rows // (heads // group)).to(tl.int64)
    o_value = tl.arange(0, BLOCK_V)[None, :]
    m_value = m_x[:, None] & (o_value < VALUE_DIM)

    b_top = tl.full([BLOCK_R], -INF, tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_out = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    head = head_of(terms, o_b, o_h, length_of(seqlens, capacity, o_b), KIND)
    stream = Stream(counts, batch, tiles, programs, minimum)
    o_first = o_x
    ranges = maximum
    if stream.counts is not None:
        o_first, b_ranges = ranges_of(stream, o_x, rows, heads // group, BLOCK_M)
        splits = tl.max(b_ranges, 0)
        ranges = BLOCK_M
    # row_max over ranges
    if KIND == "softmax":
        for i in range(splits):
            p_top = partials.tops + tl.cast(i, tl.int64) * ranges + o_first
            b_top = tl.maximum(
                b_top, load_part(p_top, None if stream.counts is None else i < b_ranges, -INF)
            )
    b_row_max = tl.where(b_top == -INF, 0.0, b_top)
    for i in range(splits):
        o_partial = tl.cast(i, tl.int64) * ranges + o_first
        m_range = None if stream.counts is None else i < b_ranges
        m_part = m_value if m_range is None else m_value & m_range[:, None]
        p_value = partials.outs + o_partial[:, None] * VALUE_DIM + o_value
        b_value = tl.load(p_value, mask=m_part, other=0.0)
        if KIND == "softmax":
            b_own = load_part(partials.tops + o_partial, m_range, -INF)
            # O += O_r exp(row_max_r - row_max), row_sum likewise
            b_weight = tl.where(b_own == b_row_max, 1.0, exponential(b_own - b_row_max, head))
            b_sum += load_part(partials.sums + o_partial, m_range, 0.0) * b_weight
            b_out += b_value * b_weight[:, None]
        else:
            if NORMALIZE != "none":
                b_sum += load_part(partials.sums + o_partial, m_range, 0.0)
            b_out += b_value

    if KIND == "softmax":
        b_sink = None
        if sink is not None:
            b_sink = tl.load(sink + o_h)
        b_factor, b_sum = normaliser(b_top, b_sum, b_sink, head)
        if scales is not None:
            tl.store(scales + o_x, b_row_max, mask=m_x)
            tl.store(scales + maximum + o_x, b_factor, mask=m_x)
    else:
        b_factor = unscaled(b_sum, WEIGHTS, KIND, NORMALIZE)
    if KIND == "softmax" or NORMALIZE != "none":
        tl.store(lse + (o_b * heads + o_h) * seqlen_q + o_i, b_sum, mask=m_x)
    # O = O / row_sum
    p_out = row_pointers(out, o_b, o_i, o_h)
    store_tile(p_out, m_x, b_out * b_factor[:, None], VALUE_DIM)


def rows_of(t: Tensor) -> Rows:
    """Rows view of [B, S, H, D] or packed [T, H, D]."""
    return Rows(t, *(0, *t.stride())[-4:-1])


def new_partials(q: Tensor, *shape: int, value_dim: int) -> Partials:
    return Partials(
        *(q.new_empty(shape + last, dtype=torch.float32) for last in ((value_dim,), (), ()))
    )


def merge(
    partials: Partials,
    seqlens_k: Tensor,
    capacity: int,
    out: Tensor,
    lse: Tensor,
    scales: Tensor | None,
    sink: Tensor | None,
    terms: Terms,
    group: int,
    stream: Stream = NO_STREAM,
    kind: str = "softmax",
    normalize: str = "none",
    weights_of: torch.dtype | None = None,
) -> None:
    """weights_of: dtype of the weights in P V, None = dtype of out."""
    splits, *_, block_m, value_dim = partials.outs.shape
    seqlen_q, heads = out.shape[1:3]
    maximum = out.shape[0] * seqlen_q * heads
    block_v = triton.next_power_of_2(value_dim)
    block_r = max(1, (1 << 16 if INTERPRETED.value else 2048) // block_v)
    launch(
        merge_kernel,
        triton.cdiv(maximum, block_r),
        out,
        partials,
        seqlens_k,
        capacity,
        rows_of(out),
        lse,
        scales,
        sink,
        terms,
        *stream,
        heads,
        group,
        seqlen_q,
        splits,
        maximum,
        VALUE_DIM=value_dim,
        KIND=kind,
        NORMALIZE=normalize,
        WEIGHTS=TYPES[weights_of or out.dtype],
        BLOCK_M=1 if stream.counts is None else block_m,
        BLOCK_R=block_r,
        BLOCK_V=block_v,
    )
