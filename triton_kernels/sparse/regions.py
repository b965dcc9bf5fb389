"""Maps cut into regions: pixel addressing, pixels visible to a query tile, queries of a key tile.

A position is y 2^X_BITS + x, NOWHERE if there is no such pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common import INF, X_BITS
from .blocks import NOWHERE


class Grid(NamedTuple):
    """Regions in row-major order. Regions at the right and lower border are partial where regions
    do not divide the map: some of their pixels are missing. by_*: see `divisor`."""

    height: Any
    width: Any
    region_height: Any
    region_width: Any
    pixels: Any  # pixels of a whole region
    columns: Any  # regions per row
    by_pixels: Any
    by_width: Any  # by region_width
    by_columns: Any


class PixelTile(NamedTuple):
    """Rows of a query tile: row m is pixel m // group of a region, head m % group."""

    o_i: Any
    o_h: Any
    m_row: Any
    left: Any  # rows of the region from the start of this tile on
    b_end: Any = None


class PixelKeys(NamedTuple):
    """Numbering of the pixels of listed regions; every region counts as many as a whole one."""

    p_ids: Any
    full: Any  # pixels before it all exist; a tile boundary
    total: Any
    end: Any  # end of positions
    grid: Any


class PixelKeyTile(NamedTuple):
    o_j: Any
    b_bit: Any  # region within the tile
    end: Any  # end of positions


class PixelQueries(NamedTuple):
    """Numbering of query rows in regions that list a region of a key tile; every region counts as
    many as a whole one. Each pixel has one row per head."""

    p_rows: Any
    p_bits: Any  # regions of the tile that each row's list holds; None: the tile has one region
    listed: Any  # 0: no row sees keys without listing their region
    full: Any  # rows from here on see all keys of the tile
    total: Any
    end: Any  # end of positions
    grid: Any


def divisor(n: int) -> int:
    """Magic number for `quotient` by n, for dividends below 2^31: a multiplier in the low 32 bits,
    above them the shift plus one. Always 64 bits wide, so that its type does not depend on n.
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
    pixels = region_height * region_width
    columns = quotient(width - 1, by_width) + 1
    return Grid(
        height, width, region_height, region_width, pixels, columns, by_pixels, by_width, by_columns
    )


@triton.jit
def grids_of(
    q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width,
    k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns,
):  # fmt: skip
    """Regions of the queries and of the keys: equally many per row."""
    queries = grid_of(
        q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width, by_columns
    )
    keys = grid_of(
        k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns
    )
    return queries, keys


@triton.jit
def corner_of(grid, o_r):
    o_row = quotient(o_r, grid.by_columns)
    return o_row * grid.region_height, (o_r - o_row * grid.columns) * grid.region_width


@triton.jit
def pixels_of(grid, o_r, o_pixel):
    """Positions of pixels, numbered as in whole regions."""
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
    """Positions of rows o_u, and their list bits."""
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
    """Key tile i_tile of the concatenated pixels of `regions` regions, from i_r on."""
    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_bit = quotient(o_n, grid.by_pixels)
    m_own = b_bit < regions
    o_j = pixels_of(grid, i_r + b_bit, o_n - b_bit * grid.pixels)
    return PixelKeyTile(tl.where(m_own, o_j, NOWHERE), b_bit, NOWHERE)


@triton.jit
def pixel_queries(grid, lists, i_list, wide, i_wide, entries, GROUP: tl.constexpr):
    """Queries of key tile i_wide, from transposed list i_list, each of which has room for `entries`
    entries."""
    p_offset = lists.offsets + i_list * (wide + 1) + i_wide
    first = tl.load(p_offset)
    o_rows = i_list * entries + first
    p_bits = None
    total = (tl.load(p_offset + 1) - first) * (grid.pixels * GROUP)
    full = total - total
    if lists.bits is not None:
        p_bits = lists.bits + o_rows
        full = total
    return PixelQueries(lists.rows + o_rows, p_bits, 0, full, total, NOWHERE, grid)


@triton.jit
def logit_of_pads(grid, p_ids, count):
    """log of the number of padding pixels in the listed regions: together, the pads weigh as much
    as one key with this logit."""
    pads = count - count
    for e in range(0, count, 64):
        o_e = e + tl.arange(0, 64)
        m_e = o_e < count
        o_y, o_x = corner_of(grid, tl.load(p_ids + o_e, mask=m_e, other=0))
        b_height = tl.minimum(grid.height - o_y, grid.region_height)
        b_width = tl.minimum(grid.width - o_x, grid.region_width)
        pads += tl.sum(tl.where(m_e, grid.pixels - b_height * b_width, 0), 0)
    return tl.where(pads > 0, tl.log(tl.maximum(pads, 1).to(tl.float32)), -INF)
