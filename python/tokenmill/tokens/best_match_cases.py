"""Sample calls of best_match."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Sample


def _whole_numbers(batch: int, rows: int, partners: int, channels: int) -> Any:
    """Small integers, exact in every dtype and in tf32: many products are equal."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a, b = (
            torch.randint(-2, 3, (batch, n, channels), generator=g).to(dtype)
            for n in (rows, partners)
        )
        return (a, b), {}

    return make


def _separate(batch: int, rows: int, partners: int, channels: int, change: Any = None) -> Any:
    """Rows of b are dissimilar, and each row of a is nearly one of them, scaled. Both are views of
    one tensor.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        signs = torch.randint(0, 2, (batch, partners, channels), generator=g) * 2.0 - 1
        signs[:, :, :partners] += 2 * torch.eye(partners, min(partners, channels))
        own = torch.randint(0, partners, (batch, rows), generator=g)
        lengths = torch.rand(batch, max(rows, partners), 1, generator=g) + 0.5
        near = signs.gather(1, own[..., None].expand(-1, -1, channels))
        near = near + 0.1 * torch.randn(near.shape, generator=g)
        tokens = torch.zeros(batch, 2 * max(rows, partners), channels)
        tokens[:, : 2 * rows : 2] = near * lengths[:, :rows]
        tokens[:, 1 : 2 * partners : 2] = signs * lengths[:, :partners]
        if change:
            change(tokens)
        tokens = tokens.to(dtype)
        return (tokens[:, : 2 * rows : 2], tokens[:, 1 : 2 * partners : 2]), {"normalize": True}

    return make


def _hostile(tokens: Tensor) -> None:
    """a has rows of zeros, NaN and inf; b has these, and one more row of inf."""
    tokens[0, 2:4] = 0
    tokens[0, 6:8] = torch.nan
    tokens[0, 10, 1] = torch.inf
    tokens[0, 13, 2] = -torch.inf


SAMPLES = (
    Sample("ties", _whole_numbers(2, 37, 70, 12)),
    Sample("normalized", _separate(2, 21, 25, 40)),
    Sample("not finite", _separate(1, 9, 12, 33, _hostile)),
    Sample("one channel", _whole_numbers(2, 5, 3, 1)),
    Sample("many channels", _whole_numbers(1, 3, 67, 301)),
    Sample("no partners", _whole_numbers(2, 3, 0, 8)),
    Sample("no rows", _whole_numbers(2, 0, 3, 8)),
)
