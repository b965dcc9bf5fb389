"""Sample calls of segment_reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Sample


def draw_offsets(batch: int, segments: int, places: int, g: torch.Generator) -> Tensor:
    """Offsets of segments with random boundaries; some segments are empty."""
    ends = torch.randint(places + 1, (batch, segments + 1), generator=g)
    return ends.sort(-1).values.int()


def _sample(
    shape: tuple[int, int, int],
    segments: int,
    reduce: str,
    *,
    perm: int = 0,
    weight: bool = False,
    **options: Any,
) -> Any:
    """perm: more positions than rows; the surplus and a few others are -1."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch, tokens, channels = shape
        x = torch.randn(batch, tokens, channels, generator=g).to(dtype)
        places = tokens + perm
        offsets = draw_offsets(batch, segments, places, g)
        tensors: dict[str, Tensor] = {}
        if perm:
            rows = torch.rand(batch, places, generator=g).argsort(-1).int()
            tensors["perm"] = torch.where(rows < tokens - 1, rows, -1)
        if weight:
            wide = torch.promote_types(dtype, torch.float32)
            tensors["weight"] = (0.5 + torch.rand(batch, tokens, generator=g)).to(wide)
        return (x, offsets), {"reduce": reduce, **tensors, **options}

    return make


SAMPLES = (
    Sample(
        "weighted mean of a perm",
        _sample((2, 37, 40), 6, "mean", perm=3, weight=True, return_weight_sum=True),
    ),
    Sample("weighted sum", _sample((1, 300, 17), 9, "sum", weight=True)),
    Sample("amax", _sample((2, 30, 33), 7, "amax")),
    Sample("amin of a perm", _sample((1, 25, 16), 4, "amin", perm=2, return_weight_sum=True)),
    Sample("first, one channel", _sample((3, 20, 1), 6, "first")),
    Sample("last of a perm", _sample((1, 40, 24), 5, "last", perm=5)),
    Sample("no rows", _sample((2, 0, 8), 3, "mean")),
)
