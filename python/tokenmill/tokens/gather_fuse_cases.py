"""Sample calls of gather_fuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Sample


def _sample(shape: tuple[int, int, int], kept: int, dropped: int = 0, **options: Any) -> Any:
    """In a random order of patches, the first are kept and the last are dropped."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        change = options.get("change")
        given = {name: value for name, value in options.items() if name != "change"}
        batch, tokens, _ = shape
        patches = tokens - int(given.get("prefix", 1))
        x = torch.randn(shape, generator=g).to(dtype)
        order = torch.rand(batch, patches, generator=g).argsort(1)
        keep, rest = order[:, :kept].int(), order[:, kept : patches - dropped].int()
        weight = torch.rand(batch, patches, generator=g)
        args = (x, keep, rest, weight.to(torch.promote_types(dtype, torch.float32)))
        return change(*args) if change else args, given

    return make


def _holes(x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """int64 indices, entries of -1, and a sequence whose weights add up to 0."""
    keep, rest, weight = keep.long(), rest.long(), weight.clone()
    keep[0, 1] = rest[0, 2] = -1
    weight[1] = 0
    return x, keep, rest, weight


def _strided(x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x[..., 5:], keep, rest, weight[:, None].expand(-1, 2, -1)[:, 1].to(x.dtype)


SAMPLES = (
    Sample("sum", _sample((2, 14, 24), 7)),
    Sample("normalized", _sample((2, 18, 16), 5, 3, normalize=True)),
    Sample("holes, no prefix", _sample((3, 13, 5), 4, prefix=0, change=_holes)),
    Sample(
        "zero weights",
        _sample((2, 12, 8), 3, prefix=2, normalize=True, change=_holes),
    ),
    Sample("strided, many rows", _sample((1, 151, 13), 9, change=_strided)),
    Sample("all kept", _sample((2, 6, 8), 5)),
    Sample("no patches", _sample((2, 1, 8), 0, normalize=True)),
)
