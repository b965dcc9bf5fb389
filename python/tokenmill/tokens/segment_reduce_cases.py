"""Samples and malformed calls of segment_reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._edits import set_argument, set_options
from ..registry import Malformed, Sample


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

# Edits of the first sample.
MALFORMED = (
    Malformed(
        "rank",
        "x: must have 3 dimensions [B, N, C] or 2 [T, C]; got 1",
        set_argument(0, lambda t: t[0, 0]),
    ),
    Malformed(
        "packed with offsets of a batch",
        "offsets: must have 1 dimension with x [T, C]; got 2",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "dtype",
        "x: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "layout",
        "x: must have a contiguous last dimension",
        set_argument(0, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    ),
    Malformed(
        "batch of offsets",
        "offsets: must have shape [2, S + 1]; got [1, 7]",
        set_argument(1, lambda t: t[:1]),
    ),
    Malformed(
        "dtype of offsets", "offsets: must be int32; got int64", set_argument(1, torch.Tensor.long)
    ),
    Malformed(
        "batch of perm",
        "perm: must have shape [2, K]; got [2]",
        set_options(perm=torch.zeros(2, dtype=torch.int32)),
    ),
    Malformed(
        "reduce",
        "reduce: must be 'sum', 'mean', 'amax', 'amin', 'first' or 'last'; got 'max'",
        set_options(reduce="max"),
    ),
    Malformed(
        "shape of weight",
        "weight: must have shape [2, 37]; got [2, 36]",
        set_options(weight=torch.ones(2, 36)),
    ),
    Malformed(
        "type of weight",
        "weight: must be of a floating type; got int64",
        set_options(weight=torch.ones(2, 37, dtype=torch.int64)),
    ),
    Malformed(
        "weight of an extreme",
        "weight: goes with reduce 'sum' and 'mean' alone; got 'amax'",
        set_options(reduce="amax"),
    ),
    Malformed(
        "offset",
        "offsets: must be 0 to 40; got 41",
        set_argument(1, lambda t: t.where(t < t.amax(), 41)),
        values=True,
    ),
    Malformed(
        "decreasing offsets",
        "offsets: must not decrease; got",
        set_argument(1, lambda t: t.flip(1).contiguous()),
        values=True,
    ),
    Malformed(
        "row of perm",
        "perm: must be -1 to 36; got 37",
        set_options(perm=torch.full((2, 40), 37, dtype=torch.int32)),
        values=True,
    ),
    Malformed(
        "row twice",
        "perm: must not name a token twice; got 5",
        set_options(perm=torch.full((2, 40), 5, dtype=torch.int32)),
        values=True,
    ),
)
