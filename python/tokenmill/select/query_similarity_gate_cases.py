"""Samples and malformed calls of query_similarity_gate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..registry import Malformed, Sample


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


MALFORMED = (
    Malformed(
        "rank",
        "q: must have 4 dimensions [B, S, H, D]; got 3",
        lambda a, k: a.__setitem__(0, a[0][0]),
    ),
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int32",
        lambda a, k: a.__setitem__(0, a[0].int()),
    ),
    Malformed(
        "dtype of q_ref",
        "q_ref: must have the dtype of q, float32; got float16",
        lambda a, k: a.__setitem__(1, a[1].half()),
    ),
    Malformed(
        "layout",
        "q_ref: must have a contiguous last dimension",
        lambda a, k: a.__setitem__(1, a[1].expand(5, 2, 4, 32).transpose(2, 3)),
    ),
    Malformed(
        "heads",
        "q_ref: must have the B, H and D of q, [5, 4, 32]; got [5, 3, 32]",
        lambda a, k: a.__setitem__(1, a[1][:, :, 1:]),
    ),
)
