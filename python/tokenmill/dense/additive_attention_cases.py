"""Sample calls of additive_attention."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


def _sample(batch: int, rows: int, keys: int, width: int, mask: str = "", scale: float = 1) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q = torch.randn(batch, rows, width, generator=g) * scale
        k = torch.randn(batch, keys, width, generator=g) * scale
        v = torch.randn(width, generator=g)
        args = tuple(t.to(dtype) for t in (q, k, v))
        if not mask:
            return args, {}
        shape = (batch, keys) if mask == "keys" else (batch, rows, keys)
        visible = torch.rand(shape, generator=g) < 0.6
        visible[-1, :1] = False  # of pairs: a query with no visible input
        return args, {"mask": visible}

    return make


SAMPLES = (
    Sample("all", _sample(2, 5, 21, 20)),
    Sample("masked keys", _sample(2, 6, 19, 33, mask="keys")),
    Sample("masked pairs", _sample(2, 7, 9, 8, mask="pairs")),
    Sample("small tangents", _sample(1, 3, 5, 16, scale=1e-3)),
    Sample("saturated", _sample(1, 4, 6, 17, scale=8)),
    Sample("one query", _sample(1, 1, 40, 33)),
    Sample("tiles", _sample(1, 66, 67, 3)),
    Sample("no inputs", _sample(2, 3, 0, 8)),
    Sample("no width", _sample(1, 2, 3, 0)),
)
