"""Samples and malformed calls of gather_fuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._edits import set_argument, set_options
from ..registry import Malformed, Sample


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


MALFORMED = (
    Malformed(
        "rank",
        "x: must have 3 dimensions [B, N, C]; got 2",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "dtype",
        "x: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "prefix",
        "prefix: must be 0 to the number of tokens, 14; got 15",
        set_options(prefix=15),
    ),
    Malformed(
        "batch of keep",
        "keep: must have shape [2, K]; got [1, 7]",
        set_argument(1, lambda t: t[:1]),
    ),
    Malformed(
        "dtype of rest",
        "rest: must be int32; got int16",
        set_argument(2, lambda t: t.short()),
    ),
    Malformed(
        "shape of weight",
        "weight: must have shape [2, 13]; got [2, 12]",
        set_argument(3, lambda t: t[:, 1:]),
    ),
    Malformed(
        "dtype of weight",
        "weight: must be float32; got int64",
        set_argument(3, lambda t: t.long()),
    ),
    Malformed(
        "shape of out",
        "out: must have shape [2, 9, 24]; got [2, 8, 24]",
        set_options(out=torch.zeros(2, 8, 24)),
    ),
    Malformed(
        "expanded out",
        "out: must have each element at an address of its own; strides; got [0, 24, 1]",
        set_options(out=torch.zeros(9, 24).expand(2, 9, 24)),
    ),
    Malformed(
        "out over x",
        "out: must not share memory with x; strides; got [336, 24, 1]",
        lambda a, k: k.update(out=a[0][:, 5:]),
    ),
    Malformed(
        "beyond the end",
        "keep: must be -1 to 12; got 13",
        set_argument(1, lambda t: torch.full_like(t, 13)),
        values=True,
    ),
    Malformed(
        "in both",
        "rest: must not name a token twice; got 3",
        lambda a, k: (
            a.__setitem__(1, torch.tensor([[3], [4]])),
            a.__setitem__(2, torch.tensor([[3], [5]])),
        )[0],
        values=True,
    ),
)
