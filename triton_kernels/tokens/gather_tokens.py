"""gather_tokens: a program copies a few of the rows that the indices of a sequence name."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from .rows import bits_of, copy_rows, steps_of, tile_of

SIZES = ["x_batch", "indices_batch", "out_batch", "entries", "tokens", "rows", "blocks"]


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(
    x, indices, out, x_batch, x_token, indices_batch, entries, tokens, rows, blocks, channels,
    out_batch, out_row,
    FLAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_b = (i // blocks).to(tl.int64)
    o_k = (i % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_k = o_k < entries
    b_id = tl.load(indices + i_b * indices_batch + o_k, mask=m_k, other=-1).to(tl.int64)
    m_id = (b_id >= 0) & (b_id < rows)
    if FLAT:
        p_from = x + b_id // tokens * x_batch + b_id % tokens * x_token
    else:
        p_from = x + i_b * x_batch + b_id * x_token
    copy_rows(out + i_b * out_batch + o_k * out_row, p_from, m_k, m_id, channels, BLOCK_C)


def gather_tokens(a: Any) -> Tensor:
    out = a.x.new_empty((*a.indices.shape, a.x.shape[2]))
    _gather(a, out)
    return out


def gather_tokens_out(a: Any) -> None:
    _gather(a, a.out)


def _gather(a: Any, out: Tensor) -> None:
    batch, tokens, channels = a.x.shape
    flat = a.indices.dim() == 1
    entries = a.indices.shape[-1]
    tile = tile_of(channels)
    blocks = triton.cdiv(entries, tile["BLOCK_R"])
    launch(
        gather_kernel, (1 if flat else batch) * blocks if channels else 0, a.x, bits_of(a.x),
        a.indices, bits_of(out), *steps_of(a.x, 2), 0 if flat else a.indices.stride(0), entries,
        max(tokens, 1), batch * tokens if flat else tokens, blocks, channels,
        *steps_of(out[None] if flat else out, 2), FLAT=flat, **tile,
    )  # fmt: skip
