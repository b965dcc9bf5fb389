"""Random tensors, masks and decays for sample calls, from (dtype, generator)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import masks


def draw_tensor(*shape: int, positive: bool = False) -> Any:
    def draw(dtype: torch.dtype, g: torch.Generator) -> Tensor:
        x = torch.randn(shape, generator=g)
        return (x.abs() if positive else x).to(dtype)

    return draw


def draw_mask(*shape: int) -> Any:
    def draw(dtype: torch.dtype, g: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=g) < 0.7

    return draw


def draw_integers(*shape: int, low: int = 0, high: int) -> Any:
    def draw(g: torch.Generator) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.int32)

    return draw


def draw_ranges(*shape: int, keys: int) -> Any:
    """Random ranges: some empty, some reaching past the keys."""

    def draw(dtype: torch.dtype, g: torch.Generator) -> masks.Ranges:
        begin = draw_integers(*shape, low=-3, high=keys)(g)
        return masks.ranges(begin, begin + draw_integers(*shape, low=-1, high=keys // 2 + 2)(g))

    return draw


def draw_prefix(*lengths: int) -> Any:
    return lambda dtype, g: masks.prefix(torch.tensor(lengths, dtype=torch.int32))


def draw_segments(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...] | None = None,
    sort: bool = True,
    **options: Any,
) -> Any:
    def draw(dtype: torch.dtype, g: torch.Generator) -> masks.Segments:
        q_ids, k_ids = (draw_integers(*(s or q_shape), high=5)(g) for s in (q_shape, k_shape))
        if sort:
            q_ids, k_ids = q_ids.sort(-1)[0], k_ids.sort(-1)[0]
        return masks.segments(q_ids, k_ids if k_shape else None, **options)

    return draw


def draw_decay(*heads: int, **options: Any) -> Any:
    return lambda dtype, g: masks.decay2d(torch.rand(heads, generator=g), **options)


def draw_masks(*draws: Any) -> Any:
    return lambda dtype, g: tuple(draw(dtype, g) for draw in draws)
