"""cluster_tokens: one kernel measures pixels of a home cell against the clusters of their window;
another owns a cluster and accumulates the pixels that reach it. Memory holds the distances of one
slab at a time: some rows of cells of all images."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..common import FLOAT_MAX, INF, INTERPRETED, LOG2E, launch, rounded
from .nearest import NOWHERE, MapRows, find_nearest, squared_distances
from .reconstruct_tokens import channel_block

SLAB = 1 << 24  # max distances in memory
MIN = tl.constexpr(-100.0)  # weights below 2^MIN of the pixel's maximum are 0
SIZES = ["tiles", "cells", "maximum", "first", "last"]


class Grid(NamedTuple):
    height: int
    width: int
    grid_y: int
    grid_x: int
    reach: int
    window: int  # distances per pixel in memory
    channels: int


class Slab(NamedTuple):
    """Distances [B, lines, X, window] of each pixel to the clusters of its window, row-major, with
    the minimum and the weight sum of each pixel, [B, lines, X]."""

    distances: Tensor
    minimum: Tensor
    total: Tensor
    line: int  # first line of pixels
    lines: int


class Home(NamedTuple):
    """A grid cell: its pixels, and the clusters of their window."""

    y: Any
    x: Any
    width: Any  # pixels per line
    pixels: Any
    cluster_y: Any
    cluster_x: Any
    across: Any  # clusters per row
    clusters: Any


# One function: each call costs Triton's interpreter as much as 40 operations.
@triton.jit
def home_of(grid, cell_y, cell_x):
    y = (cell_y * grid.height + grid.grid_y - 1) // grid.grid_y
    x = (cell_x * grid.width + grid.grid_x - 1) // grid.grid_x
    lines = ((cell_y + 1) * grid.height + grid.grid_y - 1) // grid.grid_y - y
    width = ((cell_x + 1) * grid.width + grid.grid_x - 1) // grid.grid_x - x
    cluster_y = tl.maximum(cell_y - grid.reach, 0)
    cluster_x = tl.maximum(cell_x - grid.reach, 0)
    across = tl.minimum(cell_x + grid.reach + 1, grid.grid_x) - cluster_x
    clusters = (tl.minimum(cell_y + grid.reach + 1, grid.grid_y) - cluster_y) * across
    return Home(y, x, width, lines * width, cluster_y, cluster_x, across, clusters)


@triton.jit
def weights_of(b_d, b_min, b_total, m_d, factor):
    b_t = tl.where(m_d, (b_min - b_d) * factor, 2 * MIN)
    b_w = tl.exp2(b_t) / b_total
    return tl.where(m_d & ((b_t < MIN) == 0), b_w, 0.0)


@triton.jit
def pixels_of(grid, first, cells, tiles, BLOCK_P: tl.constexpr):
    """Sequence of a program, home cell of its pixels, mask of existing pixels, and their
    coordinates."""
    i = tl.program_id(0)
    i_cell = i // tiles % cells
    i_b = (i // tiles // cells).to(tl.int64)
    cell_y = (first + i_cell // grid.grid_x).to(tl.int64)
    cell_x = (i_cell % grid.grid_x).to(tl.int64)
    home = home_of(grid, cell_y, cell_x)
    o_p = i % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    o_y = (home.y + o_p // home.width).to(tl.int64)
    o_x = home.x + o_p % home.width
    return i_b, home, o_p < home.pixels, o_y, o_x


@triton.jit(do_not_specialize=SIZES)
def measure_kernel(
    x, centroids, slab, labels, grid, factor, first, cells, tiles,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Distances, minimum and weight sum of each pixel; with labels, only the nearest cluster of its
    window. cells: number of cells in the slab."""
    i_b, home, m_p, o_y, o_x = pixels_of(grid, first, cells, tiles, BLOCK_P)
    o_slab = (i_b * slab.lines + o_y - slab.line) * grid.width + o_x
    p_x = x.data + i_b * x.batch + o_y * x.line + o_x.to(tl.int64) * x.row
    b_best = tl.full([BLOCK_P], INF, tl.float32)
    b_place = tl.full([BLOCK_P], NOWHERE, tl.int32)
    b_total = tl.zeros([BLOCK_P], tl.float32)
    for k in range(0, home.clusters, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < home.clusters
        o_m = (home.cluster_y + o_k // home.across) * grid.grid_x
        o_m += home.cluster_x + o_k % home.across
        p_c = centroids + (i_b * grid.grid_y * grid.grid_x + o_m) * grid.channels
        b_d = squared_distances(p_x, m_p, p_c, m_k, grid.channels, DEPTH)
        m_d = m_p[:, None] & m_k[None, :]
        if labels is not None:
            b_d = tl.where(b_d <= FLOAT_MAX, b_d, FLOAT_MAX)
            b_d = tl.where(m_d, b_d, INF)
            b_top = tl.min(b_d, 1)
            b_at = tl.min(tl.where(b_d == b_top[:, None], o_m[None, :], NOWHERE), 1).to(tl.int32)
            b_place = tl.where(b_top < b_best, b_at, b_place)
            b_best = tl.minimum(b_best, b_top)
        else:
            p_out = slab.distances + (o_slab * grid.window)[:, None] + o_k[None, :]
            tl.store(p_out, b_d, mask=m_d)
            b_new = tl.minimum(b_best, tl.min(tl.where(m_k[None, :], b_d, INF), 1))
            # online softmax of -distance: rescale total by exp2((d_new - d_old) factor)
            b_scale = tl.exp2((b_new - tl.where(b_best < INF, b_best, b_new)) * factor)
            b_w = weights_of(b_d, b_new[:, None], 1.0, m_d, factor)
            b_total = b_total * b_scale + tl.sum(b_w, 1)
            b_best = b_new
    if labels is not None:
        o_pixel = (i_b * grid.height + o_y) * grid.width + o_x
        tl.store(labels + o_pixel, b_place, mask=m_p)
    else:
        tl.store(slab.minimum + o_slab, b_best, mask=m_p)
        tl.store(slab.total + o_slab, b_total, mask=m_p)


@triton.jit(do_not_specialize=SIZES)
def update_kernel(
    x, slab, sums, masses, grid, factor, first, last,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the pixels in cell rows first .. last to a cluster."""
    i = tl.program_id(0).to(tl.int64)
    clusters = grid.grid_y * grid.grid_x
    i_b = i // clusters
    i_m = i % clusters
    cluster_y = i_m // grid.grid_x
    cluster_x = i_m % grid.grid_x
    begin_y = tl.maximum(tl.maximum(cluster_y - grid.reach, 0), first)
    end_y = tl.minimum(tl.minimum(cluster_y + grid.reach, grid.grid_y - 1), last) + 1
    begin_x = tl.maximum(cluster_x - grid.reach, 0)
    end_x = tl.minimum(cluster_x + grid.reach + 1, grid.grid_x)
    y0 = (begin_y * grid.height + grid.grid_y - 1) // grid.grid_y
    y1 = (end_y * grid.height + grid.grid_y - 1) // grid.grid_y
    x0 = (begin_x * grid.width + grid.grid_x - 1) // grid.grid_x
    x1 = (end_x * grid.width + grid.grid_x - 1) // grid.grid_x
    across = x1 - x0
    count = tl.maximum(y1 - y0, 0) * across
    b_mass = tl.zeros([BLOCK_P], tl.float32)
    for c in range(0, grid.channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < grid.channels
        p_sum = sums + i * grid.channels + o_c
        b_sum = tl.load(p_sum, mask=m_c, other=0.0)
        for p in range(0, count, BLOCK_P):
            o_p = p + tl.arange(0, BLOCK_P)
            m_p = o_p < count
            o_y = y0 + o_p // across
            o_x = x0 + o_p % across
            o_row = tl.maximum(o_y * grid.grid_y // grid.height - grid.reach, 0)
            o_home = o_x * grid.grid_x // grid.width
            o_begin = tl.maximum(o_home - grid.reach, 0)
            o_across = tl.minimum(o_home + grid.reach + 1, grid.grid_x) - o_begin
            o_k = (cluster_y - o_row) * o_across + cluster_x - o_begin
            o_y = o_y.to(tl.int64)
            o_slab = (i_b * slab.lines + o_y - slab.line) * grid.width + o_x
            b_d = tl.load(slab.distances + o_slab * grid.window + o_k, mask=m_p, other=0.0)
            b_min = tl.load(slab.minimum + o_slab, mask=m_p, other=0.0)
            b_total = tl.load(slab.total + o_slab, mask=m_p, other=1.0)
            b_w = weights_of(b_d, b_min, b_total, m_p, factor)
            p_x = x.data + i_b * x.batch + o_y * x.line + o_x.to(tl.int64) * x.row
            m_tile = m_p[:, None] & m_c[None, :]
            b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_tile, other=0.0).to(tl.float32)
            # sum_m += Q_nm x_n
            b_sum += tl.sum(b_w[:, None] * b_x, 0)
            if c == 0:
                b_mass += b_w
        tl.store(p_sum, b_sum, mask=m_c)
    tl.store(masses + i, tl.load(masses + i) + tl.sum(b_mass, 0))


@triton.jit(do_not_specialize=SIZES)
def spread_kernel(
    dcentroids, mass, slab, dx, grid, factor, first, cells, tiles,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx_n = sum over m of Q_mn dcentroids_m / mass_m."""
    i_b, home, m_p, o_y, o_x = pixels_of(grid, first, cells, tiles, BLOCK_P)
    o_slab = (i_b * slab.lines + o_y - slab.line) * grid.width + o_x
    b_min = tl.load(slab.minimum + o_slab, mask=m_p, other=0.0)
    b_total = tl.load(slab.total + o_slab, mask=m_p, other=1.0)
    o_pixel = (i_b * grid.height + o_y) * grid.width + o_x
    for c in range(0, grid.channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = (o_c < grid.channels)[None, :]
        b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for k in range(0, home.clusters, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            m_k = o_k < home.clusters
            m_d = m_p[:, None] & m_k[None, :]
            p_d = slab.distances + (o_slab * grid.window)[:, None] + o_k[None, :]
            b_d = tl.load(p_d, mask=m_d, other=0.0)
            b_w = weights_of(b_d, b_min[:, None], b_total[:, None], m_d, factor)
            o_m = (home.cluster_y + o_k // home.across) * grid.grid_x
            o_m += home.cluster_x + o_k % home.across
            o_m = i_b * grid.grid_y * grid.grid_x + o_m
            b_mass = tl.load(mass + o_m, mask=m_k, other=0.0)
            m_some = (b_mass != 0) & m_k
            p_g = dcentroids + (o_m * grid.channels)[:, None] + o_c[None, :]
            b_g = tl.load(p_g, mask=m_some[:, None] & m_c, other=0.0).to(tl.float32)
            b_g = b_g / tl.where(m_some, b_mass, 1.0)[:, None]
            b_sum += tl.sum(b_w[:, :, None] * b_g[None, :, :], 1)
        p_dx = dx + (o_pixel * grid.channels)[:, None] + o_c[None, :]
        tl.store(p_dx, rounded(b_sum, dx.dtype.element_ty), mask=m_p[:, None] & m_c)


class Call:
    """Sizes, tiles and scratch memory of a call."""

    def __init__(self, a: Any) -> None:
        x, grid_y, grid_x = a.x, a.grid_y, a.grid_x
        batch, height, width, channels = x.shape
        reach = min(a.window // 2, max(grid_y, grid_x))
        kept = min(2 * reach + 1, grid_y) * min(2 * reach + 1, grid_x)
        self.grid = Grid(height, width, grid_y, grid_x, reach, kept, channels)
        self.x, self.batch = x, batch
        self.pixels = MapRows(x, x.stride(0), x.stride(1), x.stride(2))
        self.factor = a.tau * LOG2E.value
        cell = -(-height // grid_y) * -(-width // grid_x)
        self.block_p = min(max(triton.next_power_of_2(cell), 4), 16)
        self.tiles = triton.cdiv(cell, self.block_p)
        self.block_k, self.depth = (64, 64) if INTERPRETED.value else (16, 32)
        self.block_n = 128 if INTERPRETED.value else 16
        self.rows = grid_y
        while self.rows > 1 and self._distances(self.rows) > SLAB:
            self.rows = -(-self.rows // 2)
        self.lines = self._lines(self.rows)
        shape = (batch, self.lines, width)
        self.distances = x.new_empty((*shape, kept), dtype=torch.float32)
        self.minimum, self.total = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))

    def _lines(self, rows: int) -> int:
        return min(-(-rows * self.grid.height // self.grid.grid_y) + 1, self.grid.height)

    def _distances(self, rows: int) -> int:
        return self.batch * self._lines(rows) * self.grid.width * self.grid.window

    def slabs(self) -> Any:
        """Yields each slab, its first row of cells and the end of its rows."""
        for first in range(0, self.grid.grid_y, self.rows):
            line = -(-first * self.grid.height // self.grid.grid_y)
            slab = Slab(self.distances, self.minimum, self.total, line, self.lines)
            yield slab, first, min(first + self.rows, self.grid.grid_y)

    def measure(
        self, slab: Slab, first: int, end: int, centroids: Tensor, labels: Tensor | None = None
    ) -> None:
        cells = (end - first) * self.grid.grid_x
        launch(measure_kernel, self.batch * cells * self.tiles, self.x, self.pixels, centroids,
               slab, labels, self.grid, self.factor, first, cells, self.tiles, self.block_p,
               self.block_k, self.depth)  # fmt: skip


def cluster_tokens(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, channels = a.x.shape
    call = Call(a)
    shape = (batch, a.grid_y, a.grid_x)
    labels = a.x.new_empty((batch, height, width), dtype=torch.int32)
    pooled = F.adaptive_avg_pool2d(a.x.permute(0, 3, 1, 2).float(), (a.grid_y, a.grid_x))
    centroids = pooled.permute(0, 2, 3, 1).contiguous()
    previous, mass = centroids, centroids.new_zeros(shape)
    programs = batch * a.grid_y * a.grid_x
    for _ in range(a.iters):
        previous, mass = centroids, centroids.new_zeros(shape)
        sums = torch.zeros_like(centroids)
        for slab, first, end in call.slabs():
            call.measure(slab, first, end, previous)
            launch(update_kernel, programs, a.x, call.pixels, slab, sums, mass, call.grid,
                   call.factor, first, end - 1, call.block_n, channel_block(channels))  # fmt: skip
        some = mass != 0
        mean = sums / torch.where(some, mass, 1.0)[..., None]
        centroids = torch.where(some[..., None], mean, previous)
    if a.window_labels:
        for slab, first, end in call.slabs():
            call.measure(slab, first, end, centroids, labels)
    else:
        clusters = a.grid_y * a.grid_x
        others = MapRows(centroids, clusters * channels, 0, channels)
        sizes = (batch, height * width, width, clusters)
        labels = find_nearest(call.pixels, others, sizes, channels, None).ids
    rounded_centroids = centroids.to(a.x.dtype, copy=True)
    return rounded_centroids, labels.view(batch, height, width), mass, previous


def cluster_tokens_backward(a: Any) -> Tensor:
    call = Call(a)
    dx = a.x.new_empty(a.x.shape)
    for slab, first, end in call.slabs():
        call.measure(slab, first, end, a.previous)
        cells = (end - first) * a.grid_x
        launch(spread_kernel, call.batch * cells * call.tiles, a.x, a.dcentroids, a.mass, slab, dx,
               call.grid, call.factor, first, cells, call.tiles, call.block_p, call.block_k,
               channel_block(a.x.shape[3]) if INTERPRETED.value else 32)  # fmt: skip
    return dx
