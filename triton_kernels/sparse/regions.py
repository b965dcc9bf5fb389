"""Maps cut into regions: where pixels lie, which a tile of queries sees, which see a tile of keys.

A position is y 2^X_BITS + x, NOWHERE if there is no such pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common import INF, X_BITS
from .blocks import NOWHERE


class Grid(NamedTuple):
    """Regions in rows, numbered from the upper left one. Those at the right and the lower end are
    smaller where regions do not divide the map: pixels of whole ones that are missing. by: see
    `divisor`."""

    height: Any
    width: Any
    region_height: Any
    region_width: Any
    pixels: Any  # of a whole region
    columns: Any  # of regions
    by_pixels: Any
    by_width: Any  # of a region
    by_columns: Any


class PixelTile(NamedTuple):
    """Row m is pixel m // group of a region, of head m % group."""

    o_i: Any
    o_h: Any
    m_row: Any
    left: Any  # rows of the region from the first of the tile on
    b_end: Any = None


class PixelKeys(NamedTuple):
    """Pixels of listed regions, numbered: of each as many as a whole one has."""

    p_ids: Any
    full: Any  # those in front of it exist: whole tiles
    total: Any
    end: Any  # of positions
    grid: Any


class PixelKeyTile(NamedTuple):
    o_j: Any
    b_bit: Any  # which region of the tile a key is of
    end: Any  # of positions


class PixelQueries(NamedTuple):
    """Rows of the regions that list one of a tile of keys, numbered: of each as many as a whole one
    has. Every pixel has a row for each head."""

    p_rows: Any
    p_bits: Any  # which of the regions of a tile each one lists; None: the tile has one
    listed: Any  # 0: no row sees keys without listing their region
    full: Any  # rows from it on see all keys of the tile
    total: Any
    end: Any  # of positions
    grid: Any


def divisor(n: int) -> int:
    """Of numbers below 2^31, for `quotient`: a factor in the low 32 bits, above them one more than
    the bits by which to shift. Always 64 bits, so that its type tells no n from another.

    Division by invariant integers using multiplication (Granlund and Montgomery 1994), figure 4.1.
    """
    shift = (n - 1).bit_length()
    return (shift + 1 << 32) + ((1 << shift) - n << 32) // n + 1


@triton.jit
def quotient(o_x, by):
    b_x = o_x.to(tl.uint32)
    b_high = tl.umulhi(b_x, (by & 0xFFFFFFFF).to(tl.uint32))
    return ((b_high + b_x) >> ((by >> 32) - 1).to(tl.uint32)).to(tl.int32)


@triton.jit
def grid_of(height, width, region_height, region_width, by_pixels, by_width, by_columns):
    return Grid(
        height,
        width,
        region_height,
        region_width,
        region_height * region_width,
        quotient(width - 1, by_width) + 1,
        by_pixels,
        by_width,
        by_columns,
    )


@triton.jit
def corner_of(grid, o_r):
    o_row = quotient(o_r, grid.by_columns)
    return o_row * grid.region_height, (o_r - o_row * grid.columns) * grid.region_width


@triton.jit
def pixels_of(grid, o_r, o_pixel):
    """Positions of pixels of whole regions."""
    o_y, o_x = corner_of(grid, o_r)
    o_line = quotient(o_pixel, grid.by_width)
    o_y += o_line
    o_x += o_pixel - o_line * grid.region_width
    return tl.where((o_y < grid.height) & (o_x < grid.width), (o_y << X_BITS) + o_x, NOWHERE)


@triton.jit
def pixel_tile(grid, i_r, i_tile, i_h, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    o_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < grid.pixels * GROUP
    o_i = tl.where(m_row, pixels_of(grid, i_r, o_row // GROUP), NOWHERE)
    height = tl.minimum(grid.height - corner_of(grid, i_r)[0], grid.region_height)
    left = height * grid.region_width * GROUP - i_tile * BLOCK_M
    return PixelTile(o_i, i_h * GROUP + o_row % GROUP, o_i != NOWHERE, left)


@triton.jit
def pixel_keys(grid, p_ids, count, BLOCK_N: tl.constexpr):
    total = count * grid.pixels
    whole = (grid.height % grid.region_height == 0) & (grid.width % grid.region_width == 0)
    full = tl.where(whole, total // BLOCK_N * BLOCK_N, 0)
    return PixelKeys(p_ids, full, total, NOWHERE, grid)


@triton.jit
def find_pixel_keys(walk, o_t):
    m_list = o_t < walk.total
    o_entry = quotient(o_t, walk.grid.by_pixels)
    b_id = tl.load(walk.p_ids + o_entry, mask=m_list, other=0)
    o_j = pixels_of(walk.grid, b_id, o_t - o_entry * walk.grid.pixels)
    return tl.where(m_list, o_j, NOWHERE)


@triton.jit
def find_pixel_queries(walk, o_u, GROUP: tl.constexpr):
    """Positions of rows o_u, and what bits say of them."""
    m_list = o_u < walk.total
    o_entry = quotient(o_u // GROUP, walk.grid.by_pixels)
    b_row = tl.load(walk.p_rows + o_entry, mask=m_list, other=0)
    b_bits = b_row
    if walk.p_bits is not None:
        b_bits = tl.load(walk.p_bits + o_entry, mask=m_list, other=0)
    o_i = pixels_of(walk.grid, b_row, o_u // GROUP - o_entry * walk.grid.pixels)
    return tl.where(m_list, o_i, NOWHERE), b_bits


@triton.jit
def pixel_key_tile(grid, i_r, regions, i_tile, BLOCK_N: tl.constexpr):
    """Of tiles into which regions are cut together, i_r and those behind it."""
    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_bit = quotient(o_n, grid.by_pixels)
    m_own = b_bit < regions
    o_j = pixels_of(grid, i_r + b_bit, o_n - b_bit * grid.pixels)
    return PixelKeyTile(tl.where(m_own, o_j, NOWHERE), b_bit, NOWHERE)


@triton.jit
def pixel_queries(grid, offsets, rows, bits, i_list, wide, i_wide, entries, GROUP: tl.constexpr):
    """Of the tile of keys i_wide, by the transposed list i_list, of which each has room for
    entries."""
    p_offset = offsets + i_list * (wide + 1) + i_wide
    first = tl.load(p_offset)
    o_rows = i_list * entries + first
    p_bits = None
    total = (tl.load(p_offset + 1) - first) * (grid.pixels * GROUP)
    full = total - total
    if bits is not None:
        p_bits = bits + o_rows
        full = total
    return PixelQueries(rows + o_rows, p_bits, 0, full, total, NOWHERE, grid)


@triton.jit
def logit_of_pads(grid, p_ids, count):
    """log of how many pixels count listed regions lack of whole ones: together, the pads have the
    weight of one key with this logit."""
    pads = count - count
    for e in range(0, count, 64):
        o_e = e + tl.arange(0, 64)
        m_e = o_e < count
        o_y, o_x = corner_of(grid, tl.load(p_ids + o_e, mask=m_e, other=0))
        b_height = tl.minimum(grid.height - o_y, grid.region_height)
        b_width = tl.minimum(grid.width - o_x, grid.region_width)
        pads += tl.sum(tl.where(m_e, grid.pixels - b_height * b_width, 0), 0)
    return tl.where(pads > 0, tl.log(tl.maximum(pads, 1).to(tl.float32)), -INF)
