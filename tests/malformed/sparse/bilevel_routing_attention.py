"""Malformed calls of bilevel_routing_attention."""

from __future__ import annotations

from malformed import refused
from malformed.rules import dtype, option, qkv, scale, sliced

_NARROW = (slice(None), slice(None), slice(8))

# Edits of the first sample: q [2, 12, 14, 4, 16], k and v [2, 12, 14, 2, 16], regions (3, 2).
CALLS = (
    *qkv([2, 12, 14, 4, 16], [2, 12, 14, 2, 16], "[B, Y, X, H, D]"),
    *option("regions", "must be an integer or two, along Y and X", "many"),
    *option("regions", "must be at least 1", (0, 2)),
    *option("regions", "must not exceed the pixels of q, [12, 14]", (13, 2)),
    *option("regions", "must be given, or region_size", None),
    *option("region_size", "must not be given with regions", (4, 7)),
    *option("region_size", "must be at least 1", (0, 7), regions=None),
    refused(
        "key_region_x: must make as many regions of k along X as there are of q, 5; got 4",
        sliced("k", "v", at=_NARROW),
        regions=(3, 5),
    ),
    *scale(),
    refused("topk: must be given, or region_graph; got None", region_graph=None),
    *option("topk", "must be 1 to the number of regions, 6", 7, region_graph=None),
    *option("topk", "must not be given with region_graph", 3),
    refused(
        "region_graph: must have shape [2, heads, 6, K] with 1, 2 or 4 heads; got [2, 6, 3]",
        region_graph=lambda t: t[:, 0],
    ),
    *dtype("region_graph", "must be int32", "int64"),
)
