"""Sample calls of query_similarity_gate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..registry import Sample


def _sample(b: int, s: int, s_ref: int, h: int = 4, d: int = 32, change: Any = None) -> Any:
    """Alternating requests: near and far from the reference queries."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        base = torch.randn(b, 1, h, d, generator=g)
        q = base + 0.05 * torch.randn(b, s, h, d, generator=g)
        q_ref = base + 0.05 * torch.randn(b, s_ref, h, d, generator=g)
        q_ref[1::2] = torch.randn(q_ref[1::2].shape, generator=g)
        if change:
            change(q)
        return (q.to(dtype), q_ref.to(dtype)), {}

    return make


def _hostile(q: Tensor) -> None:
    q[0] = 0
    q[2, 0, 0, 0] = math.nan


SAMPLES = (
    Sample("decode", _sample(5, 1, 1)),
    Sample("chunk", _sample(4, 37, 5, d=20)),
    Sample("zeros and NaN", _sample(5, 2, 1, change=_hostile)),
    Sample("no tokens", _sample(2, 0, 1)),
)
