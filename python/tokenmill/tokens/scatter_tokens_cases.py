"""Samples and malformed calls of scatter_tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._edits import set_argument
from ..registry import Malformed, Sample


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


MALFORMED = (
    Malformed(
        "rank",
        "y: must have 3 dimensions [B, K, C], or 2 [K, C]; got 5",
        set_argument(0, lambda t: t[None, None]),
    ),
    Malformed(
        "dtype",
        "y: must be float16, bfloat16, float32, int32 or int64; got bool",
        set_argument(0, lambda t: t > 0),
    ),
    Malformed(
        "shape of indices",
        "indices: must have shape [2, 9]; got [2, 8]",
        set_argument(1, lambda t: t[:, 1:]),
    ),
    Malformed(
        "dtype of indices",
        "indices: must be int32; got int16",
        set_argument(1, lambda t: t.short()),
    ),
    Malformed(
        "tokens",
        "base: must have 0 to 2^31 - 1 tokens; got -1",
        set_argument(2, lambda t: -1),
    ),
    Malformed(
        "batch",
        "base: must have the batch size of y, 2; got 1",
        set_argument(2, lambda t: t[:1]),
    ),
    Malformed(
        "channels",
        "base: must have shape [2, 13, 24]; got [2, 13, 23]",
        set_argument(2, lambda t: t[..., 1:]),
    ),
    Malformed(
        "dtype of base",
        "base: must be float32; got float16",
        set_argument(2, lambda t: t.half()),
    ),
    Malformed(
        "beyond the end",
        "indices: must be -1 to 12; got 13",
        set_argument(1, lambda t: torch.full_like(t, 13)),
        values=True,
    ),
    Malformed(
        "twice",
        "indices: must not name a token twice; got 4",
        set_argument(1, lambda t: torch.full_like(t, 4)),
        values=True,
    ),
)
