"""scatter_tokens: the indices are inverted, then each program writes a few rows of the result."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from .rows import bits_of, copy_rows, places_kernel, steps_of, tile_of

SIZES = ["y_batch", "base_batch", "tokens", "blocks"]
ENTRIES = 1024  # entries per program


@triton.jit(do_not_specialize=SIZES)
def scatter_kernel(
    y, base, places, out, y_batch, y_row, base_batch, base_token, tokens, blocks, channels,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_b = (i // blocks).to(tl.int64)
    o_n = (i % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n = o_n < tokens
    b_place = tl.load(places + i_b * tokens + o_n, mask=m_n, other=-1).to(tl.int64)
    p_from = y + i_b * y_batch + b_place * y_row
    m_from = b_place >= 0
    if base is not None:
        p_from = tl.where(m_from, p_from, base + i_b * base_batch + o_n * base_token)
        m_from = m_n
    copy_rows(out + (i_b * tokens + o_n) * channels, p_from, m_n, m_from, channels, BLOCK_C)


def scatter_tokens(a: Any) -> Tensor:
    flat = a.y.dim() == 2
    rows, ids = (a.y[None], a.indices[None]) if flat else (a.y, a.indices)
    entries, channels = rows.shape[1:]
    out = a.y.new_empty((a.batch, a.tokens, channels))
    places = torch.full((a.batch, a.tokens), -1, dtype=torch.int32, device=a.y.device)
    blocks = triton.cdiv(entries, ENTRIES)
    launch(
        places_kernel, len(rows) * blocks if a.batch * a.tokens else 0, a.y, ids, places,
        0 if flat else ids.stride(0), entries, a.batch * a.tokens if flat else a.tokens, 0, blocks,
        BLOCK=ENTRIES,
    )  # fmt: skip
    tile = tile_of(channels)
    blocks = triton.cdiv(a.tokens, tile["BLOCK_R"])
    launch(
        scatter_kernel, a.batch * blocks if channels else 0, a.y, bits_of(rows),
        None if a.base is None else bits_of(a.base), places, bits_of(out),
        0 if flat else steps_of(rows, 1)[0], rows.stride(1),
        *((0, 0) if a.base is None else steps_of(a.base, 2)), a.tokens, blocks, channels, **tile,
    )  # fmt: skip
    return out
