"""Malformed calls of bilevel_routing_attention."""

from __future__ import annotations

from typing import Any

from malformed import Malformed, set_argument, set_options
from torch import Tensor


def _of_narrow_keys(args: list[Any], kwargs: dict[str, Any]) -> None:
    kwargs.update(regions=(3, 5))
    args[1:] = [t[:, :, :8] for t in args[1:]]


# Edits of the first sample: q [2, 12, 14, 4, 16], k and v [2, 12, 14, 2, 16], regions (3, 2).
CALLS = (
    Malformed(
        "rank",
        "q: must have 5 dimensions [B, Y, X, H, D]; got 4",
        set_argument(0, lambda q: q[0]),
    ),
    Malformed(
        "dtypes", "k: must have the dtype of q, float32; got float16", set_argument(1, Tensor.half)
    ),
    Malformed(
        "regions",
        "regions: must be an integer or two, along Y and X; got 'many'",
        set_options(regions="many"),
    ),
    Malformed("no regions", "regions: must be at least 1; got [0, 2]", set_options(regions=(0, 2))),
    Malformed(
        "more regions than pixels",
        "regions: must not exceed the pixels of q, [12, 14]; got [13, 2]",
        set_options(regions=(13, 2)),
    ),
    Malformed(
        "both",
        "region_size: must not be given with regions; got [4, 7]",
        set_options(region_size=(4, 7)),
    ),
    Malformed(
        "neither", "regions: must be given, or region_size; got None", set_options(regions=None)
    ),
    Malformed(
        "size of regions",
        "region_size: must be at least 1; got [0, 7]",
        set_options(regions=None, region_size=(0, 7)),
    ),
    Malformed(
        "maps of other proportions",
        "key_region_x: must make as many regions of k along X as there are of q, 5; got 4",
        _of_narrow_keys,
    ),
    Malformed(
        "scale", "scale: must be at most 2^127 in size; got inf", set_options(scale=float("inf"))
    ),
    Malformed(
        "nothing to route by",
        "topk: must be given, or region_graph; got None",
        set_options(region_graph=None),
    ),
    Malformed(
        "too many",
        "topk: must be 1 to the number of regions, 6; got 7",
        set_options(region_graph=None, topk=7),
    ),
    Malformed(
        "topk beside a graph",
        "topk: must not be given with region_graph; got 3",
        set_options(topk=3),
    ),
    Malformed(
        "shape of the graph",
        "region_graph: must have shape [2, heads, 6, K] with 1, 2 or 4 heads; got [2, 6, 3]",
        lambda args, kwargs: kwargs.update(region_graph=kwargs["region_graph"][:, 0]),
    ),
    Malformed(
        "dtype of the graph",
        "region_graph: must be int32; got int64",
        lambda args, kwargs: kwargs.update(region_graph=kwargs["region_graph"].long()),
    ),
)
