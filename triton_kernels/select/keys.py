"""Addressing of a request's keys, dense or paged."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tokenmill.select.rules import rows_of_request

# Arguments from key_sizes, excluded from specialization.
KEY_SIZES = ["key_count", "table_stride", "page_size", "pages"]


class KeyRows(NamedTuple):
    """Keys [B, S, H, D], or with a block_table pages [pages, page_size, H, D]; strides in elements.
    Kernels construct it, because fields of a tuple argument would be specialized."""

    data: Any
    batch: Any
    seq: Any
    head: Any
    rows: Any  # rows per request
    table: Any  # block_table [B, P]; None: dense
    table_stride: Any
    page_size: Any
    pages: Any


def key_sizes(k: Tensor, block_table: Tensor | None) -> tuple[int, int, int, int]:
    rows = rows_of_request(k, block_table)
    stride = 0 if block_table is None else block_table.stride(0)
    return rows, stride, max(k.shape[1], 1), k.shape[0]


@triton.jit
def length_of(lengths, i_b, rows):
    """Length of request i_b, clamped to the existing rows."""
    length = tl.zeros([], tl.int64) + rows
    if lengths is not None:
        length = tl.minimum(length, tl.maximum(tl.load(lengths + i_b).to(tl.int64), 0))
    return length


@triton.jit
def moved(keys, offset):
    """Keys whose base pointer is shifted by `offset` elements."""
    return KeyRows(keys.data + offset, keys.batch, keys.seq, keys.head, keys.rows, keys.table,
                   keys.table_stride, keys.page_size, keys.pages)  # fmt: skip


@triton.jit
def load_keys(keys, i_b, i_h, o_t, m_t, o_d, m_d):
    """Rows o_t of a head, 0 where masked or where the page is missing, and the mask of existing
    rows."""
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


@triton.jit
def load_scales(scale, keys, i_b, i_h, o_t, m_t):
    """Scales of rows o_t of a head, laid out as the keys: [P, page_size, H] with strides that may
    be 0. 1 where masked or where the page is missing."""
    o_t = o_t.to(tl.int64)
    i_page = i_b
    o_row = o_t
    if keys.table is not None:
        p_page = keys.table + i_b * keys.table_stride + o_t // keys.page_size
        i_page = tl.load(p_page, mask=m_t, other=-1).to(tl.int64)
        m_t = m_t & (i_page >= 0) & (i_page < keys.pages)
        o_row = o_t % keys.page_size
    o_scale = i_page * scale.batch + o_row * scale.seq + tl.cast(i_h, tl.int64) * scale.head
    return tl.load(scale.data + o_scale, mask=m_t, other=1.0)
