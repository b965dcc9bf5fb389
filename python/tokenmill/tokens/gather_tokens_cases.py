"""Samples and malformed calls of gather_tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._edits import set_argument, set_options
from ..registry import Malformed, Sample


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


MALFORMED = (
    Malformed(
        "rank",
        "x: must have 3 dimensions [B, N, C]; got 5",
        set_argument(0, lambda t: t[None, None]),
    ),
    Malformed(
        "dtype",
        "x: must be float16, bfloat16, float32, int32 or int64; got bool",
        set_argument(0, lambda t: t > 0),
    ),
    Malformed(
        "layout",
        "x: must have a contiguous last dimension",
        set_argument(0, lambda t: t.transpose(1, 2)),
    ),
    Malformed(
        "batch",
        "indices: must have shape [2, K], or [K]; got [1, 9]",
        set_argument(1, lambda t: t[:1]),
    ),
    Malformed(
        "dtype of indices",
        "indices: must be int32; got int16",
        set_argument(1, lambda t: t.short()),
    ),
    Malformed(
        "shape of out",
        "out: must have shape [2, 9, 24]; got [2, 8, 24]",
        set_options(out=torch.zeros(2, 8, 24)),
    ),
    Malformed(
        "dtype of out",
        "out: must be float32; got float16",
        set_options(out=torch.zeros(2, 9, 24, dtype=torch.float16)),
    ),
    Malformed(
        "expanded out",
        "out: must have each element at an address of its own; strides; got [0, 24, 1]",
        set_options(out=torch.zeros(9, 24).expand(2, 9, 24)),
    ),
    Malformed(
        "out over x",
        "out: must not share memory with x; strides; got [312, 24, 1]",
        lambda a, k: k.update(out=a[0][:, 4:]),
    ),
    Malformed(
        "beyond the end",
        "indices: must be -1 to 12; got 13",
        set_argument(1, lambda t: torch.full_like(t, 13)),
        values=True,
    ),
    Malformed(
        "below -1",
        "indices: must be -1 to 12; got -2147483648",
        set_argument(1, lambda t: torch.full_like(t, -(2**40), dtype=torch.int64)),
        values=True,
    ),
)
