"""Calls of bilevel_routing_attention that every backend must answer, or must refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._edits import set_argument, set_options
from ..dense.attention_cases import Arguments
from ..registry import Malformed, Sample


def bilevel_call(
    size: tuple[int, int] = (12, 14),
    key_size: tuple[int, int] | None = None,
    b: int = 2,
    h: int = 4,
    hk: int = 2,
    d: int = 16,
    dv: int = 16,
    graphs: int = 1,
    topk: int = 3,
    wild: bool = False,
    regions: tuple[int, int] | None = None,
    region_size: tuple[int, int] | None = None,
    **options: Any,
) -> Any:
    """graphs: 1, hk or h. wild: the graph holds invalid ids."""
    cut = {"region_size": region_size} if region_size else {"regions": regions or (3, 2)}

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        q, k, v = (
            torch.randn(b, *pixels, heads, width, generator=g).to(dtype)
            for pixels, heads, width in (
                (size, h, d),
                (key_size or size, hk, d),
                (key_size or size, hk, dv),
            )
        )
        if region_size:
            rows, columns = (-(-n // r) for n, r in zip(size, region_size, strict=True))
        else:
            rows, columns = regions or (3, 2)
        n = rows * columns
        graph = torch.rand(b, graphs, n, n, generator=g).argsort(-1)[..., :topk].int()
        if wild:
            graph = torch.randint(-2, n + 2, graph.shape, generator=g, dtype=torch.int32)
        return (q, k, v), {**cut, "region_graph": graph, "return_lse": True, **options}

    return make


FEW: Any = {"b": 1, "h": 2, "hk": 1}
SAMPLES = (
    Sample("a graph for all heads", bilevel_call()),
    Sample("a graph for each query head", bilevel_call(graphs=4, b=1)),
    Sample("a graph for each KV head", bilevel_call(graphs=2, b=1, d=24, dv=40)),
    Sample("regions that do not divide", bilevel_call((13, 17), **FEW, regions=(4, 3), topk=5)),
    Sample(
        "padding counts",
        bilevel_call((13, 17), **FEW, regions=(4, 3), topk=5, mask_padding=False),
    ),
    Sample("region size", bilevel_call((15, 20), **FEW, region_size=(2, 7), topk=6)),
    Sample("keys of a smaller map", bilevel_call((24, 16), (6, 8), regions=(3, 4), scale=0.3)),
    Sample("regions of 64 pixels", bilevel_call((16, 24), region_size=(8, 8), d=32, dv=32, b=1)),
    Sample("large regions", bilevel_call((20, 30), b=1, h=2, hk=1, regions=(2, 2), topk=2)),
    Sample("pixels one by one", bilevel_call((5, 6), region_size=(1, 1), topk=7)),
    Sample("a line of pixels", bilevel_call((1, 30), h=2, regions=(1, 4), topk=2)),
    Sample("a column of pixels", bilevel_call((30, 1), h=2, regions=(4, 1), topk=2)),
    Sample("wide heads", bilevel_call((8, 9), b=1, d=200, dv=136, h=2, hk=2)),
    Sample("all regions", bilevel_call(topk=6)),
    Sample("a graph that is none", bilevel_call((9, 10), topk=5, wild=True)),
    Sample(
        "a graph that is none, padding counts",
        bilevel_call((9, 11), regions=(2, 3), topk=5, wild=True, mask_padding=False),
    ),
    Sample("nothing routed", bilevel_call(topk=0)),
    Sample("no maps", bilevel_call(b=0)),
)


def _of_narrow_keys(args: list[Any], kwargs: dict[str, Any]) -> None:
    kwargs.update(regions=(3, 5))
    args[1:] = [t[:, :, :8] for t in args[1:]]


# Edits of the first sample: q [2, 12, 14, 4, 16], k and v [2, 12, 14, 2, 16], regions (3, 2).
MALFORMED = (
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
        "both", "region_size: goes without regions; got [4, 7]", set_options(region_size=(4, 7))
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
    Malformed("topk beside a graph", "topk: goes without region_graph; got 3", set_options(topk=3)),
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
