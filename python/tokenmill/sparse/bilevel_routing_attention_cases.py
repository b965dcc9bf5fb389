"""Sample calls of bilevel_routing_attention."""

from __future__ import annotations

from typing import Any

import torch

from ..dense.attention_cases import Arguments
from ..registry import Sample


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
