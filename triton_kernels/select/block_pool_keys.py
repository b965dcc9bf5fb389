"""block_pool_keys: a program pools token blocks of one head, one tile of tokens per step."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tokenmill.select.rules import batch_of, rows_of_request

from ..common import INF, Rows, launch, rounded
from .keys import KEY_SIZES, KeyRows, key_sizes, length_of, load_keys

TILE = 4096  # elements
SLOTS = 8  # programs that share the blocks to update
SIZES = ["out_batch", "heads", "block", "blocks", "slots"]


@triton.jit(do_not_specialize=[*SIZES, *KEY_SIZES])
def pool_kernel(
    k, table, key_count, table_stride, page_size, pages, out, lengths, start, out_batch, out_block,
    out_head, out_half, heads, block, blocks, slots,
    MEAN: tl.constexpr, BOTH: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    keys = KeyRows(k.data, k.batch, k.seq, k.head, key_count, table, table_stride, page_size, pages)
    i = tl.program_id(0)
    i_h = i % heads
    i_b = (i // (heads * slots)).to(tl.int64)
    length = length_of(lengths, i_b, keys.rows)
    first = tl.zeros([], tl.int64)
    last = first + blocks
    if start is not None:
        begin = tl.maximum(tl.load(start + i_b).to(tl.int64), 0)
        first = begin // block
        last = tl.where(begin < length, (length + block - 1) // block, first)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    for j in range(first + i // heads % slots, last, slots):
        end = tl.minimum((j + 1) * block, length)
        b_low = tl.full([BLOCK_D], 0.0 if MEAN else INF, tl.float32)
        b_high = tl.full([BLOCK_D], -INF, tl.float32)
        b_bad = tl.zeros([BLOCK_D], tl.int32)
        for t in range(j * block, end, BLOCK_T):
            o_t = t + tl.arange(0, BLOCK_T)
            b_k, m_t = load_keys(keys, i_b, i_h, o_t, o_t < end, o_d, m_d)
            b_k = b_k.to(tl.float32)
            if MEAN:
                b_low += tl.sum(b_k, 0)
            else:
                m_k = m_t[:, None] & (b_k == b_k)
                b_low = tl.minimum(b_low, tl.min(tl.where(m_k, b_k, INF), 0))
                b_high = tl.maximum(b_high, tl.max(tl.where(m_k, b_k, -INF), 0))
                b_bad += tl.sum((b_k != b_k).to(tl.int32), 0)
        p_out = out + i_b * out_batch + j * out_block + tl.cast(i_h, tl.int64) * out_head + o_d
        dtype = out.dtype.element_ty
        if MEAN:
            b_count = tl.full([BLOCK_D], 0.0, tl.float32) + tl.maximum(end - j * block, 1)
            tl.store(p_out, rounded(tl.div_rn(b_low, b_count), dtype), mask=m_d)
        else:
            if BOTH:
                tl.store(p_out, tl.where(b_bad > 0, float("nan"), b_low).to(dtype), mask=m_d)
            b_high = tl.where(b_bad > 0, float("nan"), b_high)
            tl.store(p_out + out_half, b_high.to(dtype), mask=m_d)


def _pool(a: Any, out: Tensor, start: Tensor | None) -> None:
    heads, dim = a.k.shape[2:]
    batch, blocks = out.shape[:2]
    slots = blocks if start is None else min(SLOTS, blocks)
    block_d = triton.next_power_of_2(max(dim, 1))
    block_t = min(triton.next_power_of_2(a.block), max(TILE // block_d, 1), 128)
    both = a.pooling == "minmax"
    launch(
        pool_kernel, batch * slots * heads if dim else 0, a.k, Rows(a.k, *a.k.stride()[:3]),
        a.block_table, *key_sizes(a.k, a.block_table), out, a.lengths, start, *out.stride()[:3],
        out.stride(3) if both else 0, heads, a.block, blocks, slots, MEAN=a.pooling == "mean",
        BOTH=both, DIM=dim, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def block_pool_keys(a: Any) -> Tensor:
    rows = rows_of_request(a.k, a.block_table)
    batch = batch_of(a.k, a.block_table)
    half = (2,) if a.pooling == "minmax" else ()
    out: Tensor = a.k.new_empty(
        (batch, triton.cdiv(rows, a.block), a.k.shape[2], *half, a.k.shape[3])
    )
    _pool(a, out, None)
    return out


def block_pool_keys_update(a: Any) -> None:
    _pool(a, a.pooled, a.start)
