"""Addressing of a request's keys in a dense or paged KV cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INF, Rows, dot, load_rows, load_tile, rounded, scores
from ..float8 import float8_values


class Cache(NamedTuple):
    """Keys and values, dense or paged. float8_e4m3fn caches are held as bytes, and each number is
    multiplied by the scale of its row and head, [P, page_size, Hk] with strides that may be 0, or
    None."""

    k: Rows
    v: Rows
    seqlens: Tensor
    block_table: Tensor | None
    table_stride: int
    pages: int
    capacity: int
    k_scale: Rows | None
    v_scale: Rows | None


class Store(NamedTuple):
    """The tensors of a Cache, as kernels take them, without CACHE_LENGTHS. seqlens None: keys and
    values of a call without a cache."""

    k: Rows
    v: Rows
    seqlens: Tensor | None = None
    block_table: Tensor | None = None
    k_scale: Rows | None = None
    v_scale: Rows | None = None


# Excluded from specialization: a new length does not recompile.
CACHE_LENGTHS = ["table_stride", "pages", "capacity"]


class Place(NamedTuple):
    """Keys o_j, under m_j, of one KV head of a request."""

    i_b: Any
    i_kv: Any
    o_j: Any
    m_j: Any


class Source(NamedTuple):
    """Keys and values of one KV head of a request: slices, or with a cache all of its rows."""

    cache: Any
    k: Any
    v: Any
    i_b: Any
    i_kv: Any


def held(t: Tensor) -> Tensor:
    """A cache in the dtype that kernels take: float8 as bytes."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def scale_of(t: Tensor | None) -> Rows | None:
    """Scale as Rows, from [1], [Hk] or [P, page_size, Hk]."""
    if t is None or t.dim() == 3:
        return None if t is None else Rows(t, *t.stride())
    return Rows(t, 0, 0, t.stride(0) if t.shape[0] > 1 else 0)


# Value columns per launch: more would spill. float8 values are accumulated from float32.
VALUE_COLUMNS, FLOAT8_COLUMNS = 256, 128
# Above this head_dim, Q K^T is computed in pieces.
LONG = tl.constexpr(256)
PIECE = tl.constexpr(64)


def value_parts(v: Tensor) -> tuple[Tensor, ...]:
    """Values split by columns, one launch for each part."""
    return v.split(FLOAT8_COLUMNS if v.element_size() == 1 else VALUE_COLUMNS, -1)


@triton.jit
def page_of(cache, i_b, o_j, m_j, PAGE_SIZE: tl.constexpr):
    """Page indices of keys o_j of a request, negative if missing. A dense cache has one page per
    request."""
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
    rows, cache, at, DIM: tl.constexpr, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, first_col=0
):
    """[rows, BLOCK] tile; rows of masked keys and columns beyond DIM are 0. A missing page is read
    as page 0."""
    o_page = tl.maximum(page_of(cache, at.i_b, at.o_j, at.m_j, PAGE_SIZE), 0)
    p_row = rows.data + offsets_of(rows, cache, o_page, at.o_j, at.i_kv, PAGE_SIZE)
    return load_tile(p_row, at.m_j, DIM, BLOCK, first_col)


@triton.jit
def load_source(
    rows, source, at, DIM: tl.constexpr, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, first_col=0
):
    """Keys or values of a source."""
    if source.cache is None:
        b_x = load_rows(rows, at.o_j, DIM, BLOCK, first_col)
    else:
        b_x = load_keys(rows, source.cache, at, DIM, BLOCK, PAGE_SIZE, first_col)
    return b_x


@triton.jit
def load_scale(scale, cache, at, PAGE_SIZE: tl.constexpr):
    """Scales of keys; 1 for masked keys."""
    o_page = tl.maximum(page_of(cache, at.i_b, at.o_j, at.m_j, PAGE_SIZE), 0)
    p_scale = scale.data + offsets_of(scale, cache, o_page, at.o_j, at.i_kv, PAGE_SIZE)
    return tl.load(p_scale, mask=at.m_j, other=1.0)


@triton.jit
def numbers(b_x, dtype: tl.constexpr):
    """Decodes float8 codes without their scale, exact in 16 bits too. Other dtypes pass
    unchanged."""
    if b_x.dtype == tl.uint8:
        b_x = rounded(float8_values(b_x), dtype)
    return b_x


@triton.jit
def scaled(b_qk, b_scale):
    """Multiplies Q K^T [BM, BN] by the scale of each key. An infinite scale becomes NaN: times a
    row with elements of both signs, it is NaN."""
    b_scale = tl.where(tl.abs(b_scale) < INF, b_scale, float("nan"))
    return b_qk * b_scale[None, :]


@triton.jit
def key_products(b_q, m_q, source, at, C):
    """Q K^T of a tile, times k_scale. b_q: queries, or pointers to rows m_q if HEAD_DIM > LONG: the
    product is then accumulated over pieces of PIECE columns."""
    if C.HEAD_DIM > LONG:
        b_qk = tl.zeros([b_q.shape[0], at.o_j.shape[0]], tl.float32)
        for c in range(0, C.HEAD_DIM, PIECE):
            b_piece = load_tile(b_q, m_q, C.HEAD_DIM, PIECE, c)
            b_k = load_source(source.k, source, at, C.HEAD_DIM, PIECE, C.PAGE_SIZE, c)
            b_qk += dot(b_piece, tl.trans(numbers(b_k, b_piece.dtype)))
    else:
        b_k = load_source(source.k, source, at, C.HEAD_DIM, C.BLOCK_D, C.PAGE_SIZE)
        b_qk = dot(b_q, tl.trans(numbers(b_k, b_q.dtype)))
    scale = None if source.cache is None else source.cache.k_scale
    if scale is not None:
        b_qk = scaled(b_qk, load_scale(scale, source.cache, at, C.PAGE_SIZE))
    return b_qk


@triton.jit
def load_values(source, at, C, BLOCK: tl.constexpr, first_col=0):
    """A tile of values, times v_scale. float8 values become float32, since weight times scale may
    exceed the 16-bit range."""
    b_v = load_source(source.v, source, at, C.VALUE_DIM, BLOCK, C.PAGE_SIZE, first_col)
    b_v = numbers(b_v, tl.float32)
    scale = None if source.cache is None else source.cache.v_scale
    if scale is not None:
        b_v = b_v * load_scale(scale, source.cache, at, C.PAGE_SIZE)[:, None]
    return b_v


@triton.jit
def scored_tile(
    b_q, m_q, source, o_i, o_j, terms, head, sequence, C, BLOCK: tl.constexpr, first_col=0
):
    """Scores of queries o_i [M, 1] and keys o_j, unmasked, and values of those keys: BLOCK columns
    from first_col on. b_q: queries, or pointers to rows m_q if HEAD_DIM > LONG."""
    at = Place(source.i_b, source.i_kv, o_j, o_j < sequence.k_length)
    b_v = load_values(source, at, C, BLOCK, first_col)
    # S = Q K^T
    b_qk = key_products(b_q, m_q, source, at, C)
    return scores(b_qk, o_i, o_j[None, :], terms, head, sequence), b_v


@triton.jit
def cache_of(store, table_stride, pages, capacity):
    return Cache(
        store.k, store.v, store.seqlens, store.block_table, table_stride, pages, capacity,
        store.k_scale, store.v_scale,
    )  # fmt: skip


@triton.jit
def length_of(seqlens, capacity, i_b):
    """Length of request i_b, clamped to the cache."""
    return tl.minimum(tl.maximum(tl.load(seqlens + i_b), 0), capacity)
