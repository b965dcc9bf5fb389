"""Sample calls of reconstruct_tokens."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


def _sample(
    batch: int,
    tokens: int,
    count: int,
    channels: int,
    wide: int,
    *,
    size: float = 100.0,
    views: bool = False,
    **options: Any,
) -> Any:
    """Features around centroids. Gradients take weights as constants, unlike numerical
    differentiation of the reference: perturbing large features hardly changes the weights.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        near = torch.randn(batch, count, channels, generator=g)
        own = torch.randint(0, count, (batch, tokens, 1), generator=g)
        features = near.gather(1, own.expand(-1, -1, channels))
        features = features + 0.5 * torch.randn(features.shape, generator=g)
        values = torch.randn(batch, count, wide, generator=g)
        drawn = [(size * t if i < 2 else t).to(dtype)
                 for i, t in enumerate((features, near, values))]  # fmt: skip
        if views:
            padded = [t.new_zeros(batch, 2 * t.shape[1] + 1, t.shape[2] + 3) for t in drawn]
            drawn = [p[:, 1::2, 2:-1].copy_(t) for p, t in zip(padded, drawn, strict=True)]
        return tuple(drawn), dict(options)

    return make


SAMPLES = (
    Sample("three", _sample(2, 37, 21, 20, 17, tau=1e-5)),
    Sample("views", _sample(1, 19, 70, 33, 24, views=True, tau=1e-5, k=5, norm="l2")),
    Sample("all", _sample(2, 9, 6, 8, 16, tau=1e-5, k=6)),
    Sample("one", _sample(1, 7, 40, 3, 5, tau=1.0, k=1)),
    Sample("no tokens", _sample(2, 0, 3, 4, 8, tau=1.0)),
    Sample("no sequences", _sample(0, 4, 3, 4, 8, tau=1.0)),
)
