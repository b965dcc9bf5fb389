"""Block lists: compaction of their valid entries, and the transpose, from key blocks to rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRETED, launch

# Arguments excluded from specialization.
SIZES = ["indices_batch", "indices_head", "indices_row", "counts_batch", "counts_head"]
SIZES += ["counts_row", "heads", "rows", "entries", "blocks", "maximum"]


class Lists(NamedTuple):
    """Compacted lists of wide blocks of `factor` blocks each."""

    ids: Tensor  # [B, heads, rows, entries], contiguous: strictly ascending, then padded with wide
    counts: Tensor  # [B, heads, rows]
    bits: Tensor | None  # like ids: bits of the listed blocks in a wide block; None: factor is 1
    wide: int  # number of wide blocks


class Transposed(NamedTuple):
    offsets: Tensor  # [B, heads, wide + 1]
    rows: Tensor  # [B, heads, rows * entries]
    bits: Tensor | None  # bits of each entry of rows


@triton.jit(do_not_specialize=SIZES)
def compact_kernel(
    indices, largest, counts, ids, bits, kept, indices_batch, indices_head, indices_row,
    counts_batch, counts_head, counts_row, heads, rows, entries, blocks, maximum,
    FACTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compacts BLOCK_R of the B heads rows = maximum lists. largest: running maximum of a list's
    ids."""
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < maximum
    o_row = tl.where(m_row, o_row, 0)
    o_b = (o_row // rows // heads).to(tl.int64)
    o_h = (o_row // rows % heads).to(tl.int64)
    o_r = (o_row % rows).to(tl.int64)
    p_list = indices + o_b * indices_batch + o_h * indices_head + o_r * indices_row
    p_count = counts + o_b * counts_batch + o_h * counts_head + o_r * counts_row
    b_count = tl.load(p_count, mask=m_row, other=0)
    o_first = (o_row.to(tl.int64) * entries)[:, None]

    b_kept = tl.zeros([BLOCK_R], tl.int32)
    for e in range(0, entries, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)[None, :]
        m_e = m_row[:, None] & (o_e < entries) & (o_e < b_count[:, None])
        b_id = tl.load(p_list[:, None] + o_e, mask=m_e, other=-1)
        b_before = tl.load(largest + o_first + o_e - 1, mask=m_e & (o_e > 0), other=-1)
        b_before = tl.maximum(b_before, -1)
        m_good = (b_id > b_before) & (b_id < blocks)
        b_wide = b_id // FACTOR
        b_new = (m_good & (b_before < b_wide * FACTOR)).to(tl.int32)
        o_at = o_first + b_kept[:, None] + tl.cumsum(b_new, 1) - 1
        tl.store(ids + o_at, b_wide, mask=b_new != 0)
        if bits is not None:
            tl.atomic_or(bits + o_at, 1 << (b_id & (FACTOR - 1)), mask=m_good)
        b_kept += tl.sum(b_new, 1)

    tl.store(kept + o_row, b_kept, mask=m_row)
    for e in range(0, entries, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)[None, :]
        m_e = m_row[:, None] & (o_e < entries) & (o_e >= b_kept[:, None])
        tl.store(ids + o_first + o_e, tl.cdiv(blocks, FACTOR), mask=m_e)


def compacted(indices: Tensor, counts: Tensor, blocks: int, factor: int = 1) -> Lists:
    """Keeps entries that exceed all earlier ones, as wide blocks. factor: a power of two up to
    32."""
    batch, heads, rows, entries = indices.shape
    ids = torch.empty_like(indices, memory_format=torch.contiguous_format)
    kept = counts.new_empty(counts.shape)
    bits = None if factor == 1 else indices.new_zeros(indices.shape)
    largest = indices.cummax(-1).values.contiguous() if entries else ids
    block_e = 64
    block_r = (1 << 16 if INTERPRETED.value else 1024) // block_e
    maximum = batch * heads * rows
    launch(
        compact_kernel, triton.cdiv(maximum, block_r), indices, indices, largest, counts, ids, bits,
        kept, *indices.stride()[:3], *counts.stride(), heads, rows, entries, blocks, maximum,
        FACTOR=factor, BLOCK_R=block_r, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    return Lists(ids, kept, bits, triton.cdiv(blocks, factor))


def transposed(lists: Lists) -> Transposed:
    """Rows that list each block. The sort is stable: the rows of a block are ascending."""
    batch, heads, _, entries = lists.ids.shape
    ids, order = lists.ids.flatten(2).sort(stable=True)
    ends = torch.arange(lists.wide + 1, dtype=ids.dtype, device=ids.device)
    ends = ends.expand(batch, heads, -1).contiguous()
    offsets = torch.searchsorted(ids, ends, out_int32=True)
    rows = torch.where(ids < lists.wide, order // max(entries, 1), -1).int()
    bits = None if lists.bits is None else lists.bits.flatten(2).gather(-1, order)
    return Transposed(offsets, rows, bits)


def transpose_block_list(a: Any) -> tuple[Tensor, Tensor]:
    offsets, rows, _ = transposed(compacted(a.indices, a.counts, a.num_blocks))
    return offsets, rows
