"""Sample calls of scatter_tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Sample


def _sample(
    shape: tuple[int, ...], base: tuple[int, ...] | int, change: Any = None, *, flat: bool = False
) -> Any:
    """y of a shape, and indices of which a fourth are -1."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        y = torch.randn(shape, generator=g).to(dtype)
        places = shape[:1] if flat else shape[:2]
        if isinstance(base, int):
            rows = base
        else:
            rows = base[0] * base[1] if flat and len(base) > len(shape) else base[len(places) - 1]
        drawn = torch.rand(*places[:-1], max(rows, places[-1]), generator=g).argsort(-1)
        indices = drawn[..., : places[-1]].to(torch.int32)
        indices = torch.where(torch.rand(places, generator=g) < 0.25, -1, indices)
        indices = torch.where(indices < rows, indices, -1)
        values = base if isinstance(base, int) else torch.randn(base, generator=g).to(dtype)
        args = (y, indices, values)
        return change(*args) if change else args, {}

    return make


def _pair(y: Tensor, indices: Tensor, base: Tensor) -> tuple[Any, ...]:
    return y, indices.long(), tuple(base.shape[:2])


def _strided(y: Tensor, indices: Tensor, base: Tensor) -> tuple[Any, ...]:
    return y[:, 1:, 3:], indices[:, 1:], base[..., 3:]


SAMPLES = (
    Sample("onto a base", _sample((2, 9, 24), (2, 13, 24))),
    Sample("onto zeros", _sample((2, 9, 5), 20)),
    Sample("flat", _sample((11, 8), (3, 7, 8), flat=True)),
    Sample("flat, a pair", _sample((11, 3), (3, 7, 3), _pair, flat=True)),
    Sample("strided", _sample((2, 6, 15), (2, 8, 15), _strided)),
    Sample("one channel", _sample((3, 9, 1), (3, 12, 1))),
    Sample("no rows", _sample((2, 0, 8), (2, 3, 8))),
)
