"""Where the keys of a request lie in a cache."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tokenmill._check import InputError
from tokenmill._kv_cache import unread

from ..common import Rows, load_tile


class Cache(NamedTuple):
    """Keys and values, dense or in pages."""

    k: Rows
    v: Rows
    seqlens: Tensor
    block_table: Tensor | None
    table_stride: int
    pages: int
    capacity: int


def check_read(op: str, q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Refuses the caches that these kernels do not read."""
    dims = (q.shape[-1], 0 if v is None else v.shape[-1])
    if why := unread("triton", k, dims, float8="triton", wide="triton"):
        text = f"tokenmill.{op}: backend: 'triton' cannot run this call: {'; '.join(why)}"
        raise InputError(text)


@triton.jit
def page_of(cache, i_b, o_j, m_j, PAGE_SIZE: tl.constexpr):
    """Pages of keys o_j of a request, negative where there is none. A dense cache has a page for
    each request."""
    o_page = i_b + tl.zeros_like(o_j).to(tl.int64)
    if cache.block_table is not None:
        p_page = cache.block_table + i_b * cache.table_stride + o_j // PAGE_SIZE
        o_page = tl.load(p_page, mask=m_j, other=0).to(tl.int64)
        o_page = tl.where(o_page < cache.pages, o_page, -1)
    return o_page


@triton.jit
def offsets_of(rows, cache, o_page, o_j, i_kv, PAGE_SIZE: tl.constexpr):
    o_row = o_j
    if cache.block_table is not None:
        o_row = o_j % PAGE_SIZE
    return o_page * rows.batch + o_row.to(tl.int64) * rows.seq + i_kv.to(tl.int64) * rows.head


@triton.jit
def load_keys(
    rows,
    cache,
    i_b,
    i_kv,
    o_j,
    m_j,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    first_col=0,
):
    """Rows of hidden keys and columns beyond DIM are 0. A page that does not exist is page 0."""
    o_page = tl.maximum(page_of(cache, i_b, o_j, m_j, PAGE_SIZE), 0)
    p_row = rows.data + offsets_of(rows, cache, o_page, o_j, i_kv, PAGE_SIZE)
    return load_tile(p_row, m_j, DIM, BLOCK, first_col)


@triton.jit
def length_of(seqlens, capacity, i_b):
    """Lengths outside the cache are cut."""
    return tl.minimum(tl.maximum(tl.load(seqlens + i_b), 0), capacity)
