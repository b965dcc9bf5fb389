"""Shared code of the kernels that move tokens: copies as integers, tiles, inverse indices."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # elements per program that copies
COMPUTED = 1024  # elements per program that computes
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(t: Tensor) -> Tensor:
    """Elements as integers: copying them preserves the bits of every NaN."""
    return t.view(_INTEGERS[t.element_size()]) if t.is_floating_point() else t


def steps_of(t: Tensor, dims: int) -> tuple[int, ...]:
    """Strides of the first dimensions, 0 where broadcast."""
    return tuple(0 if n == 1 else s for n, s in zip(t.shape[:dims], t.stride(), strict=False))


def tile_of(channels: int, *, computed: bool = False) -> dict[str, Any]:
    elements = COMPUTED if computed else ELEMENTS
    block_c = min(triton.next_power_of_2(max(channels, 1)), elements // 4)
    return {"BLOCK_R": elements // block_c, "BLOCK_C": block_c}


@triton.jit
def copy_rows(p_to, p_from, m_to, m_from, channels, BLOCK_C: tl.constexpr):
    """Writes the rows of m_to: rows at p_from, or zeros where not m_from."""
    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = (o_c < channels)[None, :]
        b_x = tl.load(p_from[:, None] + o_c[None, :], mask=m_from[:, None] & m_c, other=0)
        tl.store(p_to[:, None] + o_c[None, :], b_x, mask=m_to[:, None] & m_c)


@triton.jit(do_not_specialize=["indices_batch", "entries", "rows", "first", "blocks"])
def places_kernel(
    indices, places, indices_batch, entries, rows, first, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """places[s, id] = first + k over the entries k of a sequence, the maximum if several name the
    id."""
    i = tl.program_id(0)
    i_s = (i // blocks).to(tl.int64)
    o_k = i % blocks * BLOCK + tl.arange(0, BLOCK)
    b_id = tl.load(indices + i_s * indices_batch + o_k, mask=o_k < entries, other=-1)
    m_id = (b_id >= 0) & (b_id < rows)
    tl.atomic_max(places + i_s * rows + b_id, first + o_k, mask=m_id)
