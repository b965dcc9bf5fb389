"""Where the keys of a request lie, packed or in pages."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class KeyRows(NamedTuple):
    """Keys [B, S, H, D], or with a table of pages [pages, page_size, H, D]; strides in elements."""

    data: Tensor
    batch: int
    seq: int
    head: int
    rows: int  # of a request
    table: Tensor | None  # [B, P]
    table_stride: int
    page_size: int
    pages: int


def key_rows(k: Tensor, block_table: Tensor | None) -> KeyRows:
    strides = k.stride()[:3]
    if block_table is None:
        return KeyRows(k, *strides, k.shape[1], None, 0, 1, 0)
    rows = block_table.shape[1] * k.shape[1]
    return KeyRows(k, *strides, rows, block_table, block_table.stride(0), k.shape[1], k.shape[0])


@triton.jit
def length_of(lengths, i_b, rows):
    """Clamped to the rows that there are."""
    length = tl.zeros([], tl.int64) + rows
    if lengths is not None:
        length = tl.minimum(length, tl.maximum(tl.load(lengths + i_b).to(tl.int64), 0))
    return length


@triton.jit
def load_keys(keys, i_b, i_h, o_t, m_t, o_d, m_d):
    """Rows o_t of a head, 0 where masked or where the page is not there; and the mask of the rows
    that are there."""
    o_t = o_t.to(tl.int64)
    if keys.table is not None:
        p_page = keys.table + i_b * keys.table_stride + o_t // keys.page_size
        b_page = tl.load(p_page, mask=m_t, other=-1).to(tl.int64)
        m_t = m_t & (b_page >= 0) & (b_page < keys.pages)
        o_row = b_page * keys.batch + o_t % keys.page_size * keys.seq
    else:
        o_row = i_b * keys.batch + o_t * keys.seq
    o_row += tl.cast(i_h, tl.int64) * keys.head
    b_k = tl.load(
        keys.data + o_row[:, None] + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0
    )
    return b_k, m_t
