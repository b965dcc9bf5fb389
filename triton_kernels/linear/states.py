"""States entering every chunk: first each chunk's own sum, then a scan with decay.

The same pair of kernels serves the backward in reverse: the gradient of the state leaving a chunk
is the sum over later tokens of query features times output gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import span
from .common import (
    LENGTHS,
    factor_of_chunk,
    first_slot,
    from_start,
    load_features,
    load_statistic,
    load_tile,
    product,
    program_of,
    remains_of,
    rows_of,
    scale_beside,
    state_of,
    to_end,
)


@triton.jit(do_not_specialize=LENGTHS)
def sums_kernel(
    inputs, sums, factors, decay_batch, tokens, sequences, per_sequence, halvings, heads, group,
    tiles, QUERY: tl.constexpr, form,
):  # fmt: skip
    """A tile of a chunk's sum phi(X)^T Y: keys and values, weighted by decay to the end of the
    chunk, or (QUERY) queries and output gradients, weighted by decay from its start."""
    i = tl.program_id(0)
    chunk, i_h, i_tile = program_of(
        i, inputs, tokens, sequences, per_sequence, halvings, heads, heads, tiles, form
    )
    if chunk.count <= 0:
        return
    o_t = tl.arange(0, form.BLOCK_T)
    remains = remains_of(inputs.decay, decay_batch, chunk, i_h, o_t)
    if QUERY:
        rows_x = rows_of(inputs.q, chunk, i_h)
        rows_y = rows_of(inputs.dout, chunk, i_h)
        b_row = from_start(remains, o_t) * scale_beside(inputs.scale, form.MAP)
        b_normalizer = b_row
        if form.COLUMNS > form.VALUE_DIM:
            b_z = load_statistic(inputs.normalizer, chunk, i_h, o_t, 1.0)
            b_normalizer = b_row * load_statistic(inputs.delta, chunk, i_h, o_t, 0.0)
            b_row = b_row / b_z
    else:
        rows_x = rows_of(inputs.k, chunk, i_h // group)
        rows_y = rows_of(inputs.v, chunk, i_h // group)
        b_row = to_end(remains, chunk, o_t)
        b_normalizer = b_row
    o_row = chunk.first + o_t
    columns: tl.constexpr = (form.VALUE_DIM + form.BLOCK_V - 1) // form.BLOCK_V
    o_f = i_tile // columns * form.BLOCK_F + tl.arange(0, form.BLOCK_F)
    o_c = i_tile % columns * form.BLOCK_V + tl.arange(0, form.BLOCK_V)
    # phi(X)^T (decay Y)
    b_x = load_features(rows_x, o_row, o_f, inputs.scale, QUERY, form).to(tl.float32)
    b_y = load_tile(rows_y, o_row, o_c, form.VALUE_DIM)
    b_sum = product(tl.trans(b_x * b_row[:, None]), b_y, form.PRECISION)
    p_state = state_of(sums, chunk, i_h, form)
    m_tile = (o_f < form.FEATURES)[:, None] & (o_c < form.VALUE_DIM)[None, :]
    tl.store(p_state + o_f[:, None] * form.COLUMNS + o_c[None, :], b_sum, mask=m_tile)
    if form.COLUMNS > form.VALUE_DIM:
        b_column = tl.sum(b_x * b_normalizer[:, None], 0)
        m_column = o_f < tl.where(i_tile % columns == 0, form.FEATURES, 0)
        tl.store(p_state + o_f * form.COLUMNS + form.VALUE_DIM, b_column, mask=m_column)
    if inputs.decay is not None:
        tl.store(factors + chunk.slot * heads + i_h, factor_of_chunk(remains), mask=i_tile == 0)


@triton.jit(do_not_specialize=LENGTHS)
def scan_kernel(
    sums, factors, before, after, cu_seqlens, tokens, per_sequence, heads, tiles,
    REVERSE: tl.constexpr, SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scan over the chunks of one head: every chunk's sum is replaced by the state entering the
    chunk. REVERSE runs from the last chunk to the first."""
    i = tl.program_id(0)
    i_h = i // tiles % heads
    i_b = i // (tiles * heads)
    o_x = i % tiles * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < SIZE
    _, length = span(cu_seqlens, tokens, tokens, i_b)
    chunks = tl.cdiv(length, BLOCK_T)
    step = 1
    slot = first_slot(cu_seqlens, tokens, i_b, per_sequence, BLOCK_T)
    if REVERSE:
        step = -1
        slot += chunks - 1
    b_state = tl.zeros([BLOCK], tl.float32)
    if before is not None:
        o_before = tl.cast(i_b, tl.int64) * before.sequence + tl.cast(i_h, tl.int64) * before.head
        b_state = tl.load(before.data + o_before + o_x, mask=m_x, other=0.0)
    o_head = tl.cast(i_h, tl.int64) * SIZE
    o_slot = tl.cast(slot, tl.int64) * heads * SIZE + o_head
    b_next = tl.load(sums + o_slot + o_x, mask=m_x & (o_x - o_x < chunks), other=0.0)
    for c in range(chunks):
        b_sum = b_next
        o_slot = tl.cast(slot + c * step, tl.int64) * heads * SIZE + o_head
        o_next = tl.cast(slot + (c + 1) * step, tl.int64) * heads * SIZE + o_head
        b_next = tl.load(sums + o_next + o_x, mask=m_x & (o_x - o_x + c + 1 < chunks), other=0.0)
        tl.store(sums + o_slot + o_x, b_state, mask=m_x)
        if factors is not None:
            # S = decay S + phi(K)^T V
            b_state *= tl.load(factors + (slot + c * step) * heads + i_h)
        b_state += b_sum
    if after is not None:
        o_after = tl.cast(i_b, tl.int64) * after.sequence + tl.cast(i_h, tl.int64) * after.head
        tl.store(after.data + o_after + o_x, b_state, mask=m_x)
