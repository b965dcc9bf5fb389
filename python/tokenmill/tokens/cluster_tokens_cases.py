"""Sample calls of cluster_tokens."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


def _noise(shape: tuple[int, ...], **options: Any) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(shape, generator=g).to(dtype), options["grid"]), {
            name: value for name, value in options.items() if name != "grid"
        }

    return make


def _squares(side: int, cells: int, channels: int, **options: Any) -> Any:
    """Squares of one colour each with little noise: each pixel belongs to a single cluster."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        colours = 2.0 * torch.randint(-3, 4, (1, cells, cells, channels), generator=g)
        colours[..., 0] += 16 * torch.arange(cells * cells).view(cells, cells)
        x = colours.repeat_interleave(side, 1).repeat_interleave(side, 2)
        x = x + 0.1 * torch.randn(x.shape, generator=g)
        wide = torch.zeros(1, side * cells, side * cells + 3, channels + 5)
        wide[:, :, 1:-2, 3:-2] = x
        return (wide.to(dtype)[:, :, 1:-2, 3:-2], cells), dict(options)

    return make


SAMPLES = (
    Sample("soft", _noise((1, 7, 8, 20), grid=(2, 3), iters=2, tau=0.02, window=3)),
    Sample("views", _squares(3, 2, 9, iters=2, tau=0.25)),
    Sample(
        "labels of the window",
        _noise((1, 6, 5, 33), grid=(3, 2), iters=1, tau=0.01, window=5, window_labels=True),
    ),
    Sample("one cluster", _noise((2, 5, 3, 8), grid=1, iters=1, tau=1.0)),
    Sample(
        "a cluster for each pixel", _noise((1, 2, 3, 1), grid=(2, 3), iters=1, tau=1.0, window=1)
    ),
    Sample("no sequences", _noise((0, 4, 4, 8), grid=2, tau=1.0)),
)
