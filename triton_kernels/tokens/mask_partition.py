"""mask_partition: tokens are counted per block, the counts are scanned, then tokens are written."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch

BLOCK = 2048
# Arguments excluded from specialization.
SIZES = ["mask_batch", "tokens", "total", "size"]


@triton.jit
def taken_of(mask, o_i, mask_batch, tokens, total):
    p_mask = mask + (o_i // tokens).to(tl.int64) * mask_batch + o_i % tokens
    return (tl.load(p_mask, mask=o_i < total, other=0) != 0).to(tl.int32)


@triton.jit(do_not_specialize=SIZES[:3])
def count_kernel(mask, counts, mask_batch, tokens, total, SIZE: tl.constexpr):
    i = tl.program_id(0)
    o_i = i.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(counts + i, tl.sum(taken_of(mask, o_i, mask_batch, tokens, total), 0))


@triton.jit(do_not_specialize=SIZES)
def write_kernel(
    mask, ends, indices, cu_seqlens, inverse, mask_batch, tokens, total, size, SIZE: tl.constexpr
):
    """ends: inclusive prefix sum of block counts."""
    i = tl.program_id(0)
    o_i = i.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    b_taken = taken_of(mask, o_i, mask_batch, tokens, total)
    b_through = tl.cumsum(b_taken, 0)
    o_place = tl.load(ends + i) - tl.sum(b_taken, 0) + b_through - b_taken
    m_taken = (b_taken != 0) & (o_place < size)
    tl.store(indices + o_place, o_i.to(tl.int32), mask=m_taken)
    tl.store(inverse + o_i, tl.where(m_taken, o_place, -1), mask=o_i < total)
    p_begin = cu_seqlens + o_i // tokens
    tl.store(p_begin, tl.minimum(o_place, size), mask=(o_i < total) & (o_i % tokens == 0))


def mask_partition(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    mask = a.mask
    batch, tokens = mask.shape
    total = batch * tokens
    size = total if a.max_total is None else a.max_total
    indices = mask.new_full((size,), -1, dtype=torch.int32)
    cu_seqlens = mask.new_zeros((batch + 1,), dtype=torch.int32)
    inverse = mask.new_empty((batch, tokens), dtype=torch.int32)
    if total == 0:
        return indices, cu_seqlens, inverse
    block = min(BLOCK, triton.next_power_of_2(total))
    blocks = triton.cdiv(total, block)
    counts = mask.new_empty((blocks,), dtype=torch.int32)
    where = (mask.stride(0), tokens, total)
    bits = mask.view(torch.uint8)
    launch(count_kernel, blocks, mask, bits, counts, *where, SIZE=block)
    ends = counts.cumsum(0, dtype=torch.int32)
    launch(write_kernel, blocks, mask, bits, ends, indices, cu_seqlens, inverse, *where, size,
           SIZE=block, num_warps=8)  # fmt: skip
    cu_seqlens[batch:] = ends[-1:].clamp(max=size)
    return indices, cu_seqlens, inverse
