"""Sample calls of gather_tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Sample


def _sample(shape: tuple[int, ...], places: tuple[int, ...], change: Any = None) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = torch.randn(shape, generator=g).to(dtype)
        flat = len(places) == 1
        rows = shape[0] * shape[1] if flat and len(shape) > 2 else shape[0 if flat else 1]
        indices = torch.randint(-1, max(rows, 1), places, generator=g, dtype=torch.int32)
        return change(x, indices) if change else (x, indices), {}

    return make


def _strided(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, 1:, 3:], indices.clamp(max=x.shape[1] - 2).repeat(1, 2)[:, 2:9]


SAMPLES = (
    Sample("rows", _sample((2, 13, 24), (2, 9))),
    Sample("flat, int64", _sample((3, 7, 5), (11,), lambda x, i: (x, i.long()))),
    Sample("strided", _sample((2, 9, 20), (2, 6), _strided)),
    Sample("one channel", _sample((3, 40, 1), (3, 17))),
    Sample("no indices", _sample((2, 5, 8), (2, 0))),
    Sample("no tokens", _sample((2, 0, 8), (2, 3), lambda x, i: (x, i.clamp(max=-1)))),
)
