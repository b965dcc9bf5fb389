"""Sample calls of mask_partition."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


def _sample(batch: int, tokens: int, share: float, max_total: int | None = None) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = torch.rand(batch, tokens, generator=g) < share
        return (mask,), {} if max_total is None else {"max_total": max_total}

    return make


SAMPLES = (
    Sample("some", _sample(3, 67, 0.4, 150)),
    Sample("all that there may be", _sample(2, 300, 0.5)),
    Sample("one row", _sample(1, 1000, 0.01)),
    Sample("none", _sample(2, 9, 0.0, 0)),
    Sample("no tokens", _sample(3, 0, 0.5, 2)),
    Sample("no rows", _sample(0, 7, 0.5)),
)
