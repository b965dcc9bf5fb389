"""bilevel_routing_attention: one program owns a tile of queries of a region, for the query heads
that share a list and keys, and streams over the pixels of the listed regions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill._call.operator import record_of

from ..common import INTERPRETED, Rows, Terms, head_of, launch, program, terms_of
from ..dense.attention import Plan, Tiles
from .listed import LARGE_SPARSE_PLANS, SPARSE_PLANS, Listed, Statistics, attend
from .regions import divisor, grids_of, logit_of_pads, pixel_keys, pixel_tile

# Smaller tiles than block_sparse_attention: pixel addressing takes registers.
WIDE_PLAN = SPARSE_PLANS[2, 256]._replace(forward=Tiles(64, 16, 8, 2))
REGION_PLANS = SPARSE_PLANS | {(2, 256): WIDE_PLAN}
LARGE_REGION_PLANS = LARGE_SPARSE_PLANS | {
    (2, 128): LARGE_SPARSE_PLANS[2, 128]._replace(forward=Tiles(128, 32, 8, 2)),
    (2, 256): WIDE_PLAN,
    (4, 64): LARGE_SPARSE_PLANS[4, 64]._replace(
        queries=Tiles(16, 32, 4, 2), keys=Tiles(32, 16, 8, 2)
    ),
    (4, 128): LARGE_SPARSE_PLANS[4, 128]._replace(queries=Tiles(16, 16, 8, 1)),
}
# Arguments excluded from specialization: a new map or region size does not recompile.
SIZES = ["q_height", "q_width", "q_region_height", "q_region_width", "by_q_pixels", "by_q_width"]
SIZES += ["k_height", "k_width", "k_region_height", "k_region_width", "by_k_pixels", "by_k_width"]
SIZES += ["by_columns", "list_heads", "list_rows", "entries", "row_heads", "shared", "tiles"]


@triton.jit
def region_keys(keys, ids, counts, list_heads, list_rows, entries, i_b, i_h, i_r, shape):
    """Keys of the queries of region i_r, and the number of listed regions."""
    i_row = (i_b * list_heads + tl.minimum(i_h, list_heads - 1)) * list_rows + i_r
    count = tl.load(counts + i_row)
    return pixel_keys(keys, ids + i_row * entries, count, shape.BLOCK_N), count


@triton.jit(do_not_specialize=[*SIZES, "pads_count"])
def bilevel_routing_kernel(
    q, k, v, out, lse, ids, counts, terms, pads_count,
    q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width,
    k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns,
    list_heads, list_rows, entries, row_heads, shared, tiles, shape,
):  # fmt: skip
    queries, keys = grids_of(
        q_height, q_width, q_region_height, q_region_width, by_q_pixels, by_q_width,
        k_height, k_width, k_region_height, k_region_width, by_k_pixels, by_k_width, by_columns,
    )  # fmt: skip
    i_block, i_h, i_b = program(list_rows * tiles, row_heads)
    i_r = i_block // tiles
    tile = pixel_tile(queries, i_r, i_block % tiles, i_h, shape.GROUP, shape.BLOCK_M)
    if tile.left <= 0:
        return
    walk, count = region_keys(
        keys, ids, counts, list_heads, list_rows, entries, i_b, i_h, i_r, shape
    )
    b_sink = logit_of_pads(keys, walk.p_ids, count * pads_count)
    head = head_of(terms, i_b, i_h, 1)
    statistics = Statistics(row_heads * shape.GROUP, q_height * q_width, q_width)
    i_kv = i_h // shared
    attend(q, k, v, out, lse, statistics, tile, walk, None, b_sink, terms, head, i_b, i_kv, shape)


Arguments: Any = record_of("bilevel_routing_attention")


class Call(Arguments):
    """A call, and the kernel arguments derived from it."""

    @property
    def listed(self) -> Listed:
        queries, keys = self.region_y * self.region_x, self.key_region_y * self.key_region_x
        lists = self.indices, self.counts
        return Listed(self.q, self.k, self.v, *lists, queries, keys, self.indices.shape[2])

    def plan(self) -> Plan:
        """One warp per 16 rows if its registers hold them: its row reductions need no other warp,
        and small regions give many programs."""
        listed = self.listed
        plan = listed.plan(REGION_PLANS, LARGE_REGION_PLANS)
        width = max(self.q.shape[4], self.v.shape[4])
        if INTERPRETED.value or self.q.element_size() > 2 or width > 64:
            return plan
        minimum = 1 if width <= 32 else 2
        forward, queries = (
            t if t.block_m >= 64 else t._replace(num_warps=max(t.block_m // 16, minimum))
            for t in plan[:2]
        )
        keys = plan.keys
        if listed.factor(keys) > 1:
            keys = keys._replace(block_m=16)  # list bits of several regions take registers
        return Plan(forward, queries, keys)

    def terms(self) -> Terms:
        return terms_of(self.scale, 0.0, 0.0, False, None, None)

    def sizes(self) -> tuple[int, ...]:
        """Kernel arguments from q_height to shared."""
        listed = self.listed
        return (
            *self.q.shape[1:3], self.region_y, self.region_x, divisor(listed.queries),
            divisor(self.region_x), *self.k.shape[1:3], self.key_region_y, self.key_region_x,
            divisor(listed.keys), divisor(self.key_region_x),
            divisor(triton.cdiv(self.q.shape[2], self.region_x)), *self.indices.shape[1:],
            listed.row_heads, listed.shared,
        )  # fmt: skip


def map_rows(t: Tensor) -> Rows:
    """Rows view of a map [B, Y, X, H, D]."""
    batch, line, seq, head = t.stride()[:4]
    return Rows(t, batch, seq, head, line)


def bilevel_routing_attention(a: Any) -> tuple[Tensor, Tensor]:
    call = Call._make(a)
    listed = call.listed
    batch, height, width, heads = call.q.shape[:4]
    out = call.q.new_empty((batch, height, width, heads, call.v.shape[4]))
    lse = call.q.new_empty((batch, heads, height, width), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tiles = call.plan().forward
    lists = listed.compacted()
    launch(
        bilevel_routing_kernel, listed.programs(tiles), call.q,
        *map(map_rows, (call.q, call.k, call.v, out)), lse, lists.ids, lists.counts, call.terms(),
        int(not call.mask_padding), *call.sizes(), listed.query_tiles(tiles),
        **listed.options(tiles),
    )  # fmt: skip
    return out, lse
