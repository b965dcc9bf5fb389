"""Cases of scatter_tokens: tokens of DToP and Focus-DETR put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Case, Run, place

# name: sequences, tokens, tokens scattered, channels
SHAPES = {
    "50k of 200k rows": (1, 200_000, 50_000, 512),
    "Focus-DETR, 7.5k of 15k": (2, 15_000, 7_500, 256),
}


def _case(name: str, dtype: torch.dtype, based: bool) -> Case:
    batch, tokens, kept, channels = SHAPES[name]

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        y = place(torch.randn(batch, kept, channels, generator=generator).to(dtype))
        order = torch.rand(batch, tokens, generator=generator).argsort(1)
        indices = place(order[:, :kept].int())
        columns = indices.long()[..., None].expand(-1, -1, channels)
        base = place(torch.randn(batch, tokens, channels, generator=generator).to(dtype))
        if based:
            return lambda: tm.scatter_tokens(y, indices, base), {
                "torch.scatter": lambda: lambda: base.scatter(1, columns, y),
                "copy of the result": lambda: base.clone,
            }
        shape = (batch, tokens, channels)
        return lambda: tm.scatter_tokens(y, indices, tokens), {
            "torch.scatter": lambda: lambda: y.new_zeros(shape).scatter_(1, columns, y),
        }

    read = tokens if based else kept
    moved = batch * (read + tokens) * channels * dtype.itemsize + 4 * batch * kept
    onto = "base" if based else "zeros"
    return Case("scatter_tokens", f"{name}, onto {onto}", dtype, 0.0, float(moved), prepare)


def cases() -> Iterator[Case]:
    for name in SHAPES:
        yield _case(name, torch.float32, True)
        yield _case(name, torch.float32, False)
