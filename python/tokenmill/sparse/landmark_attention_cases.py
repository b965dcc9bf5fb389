"""Sample calls of landmark_attention."""

from __future__ import annotations

from typing import Any

import torch

from ..dense.attention_cases import Arguments
from ..registry import Sample


def landmark_call(
    tokens: int = 70,
    b: int = 2,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
    factor: float = 1.0,
    **options: Any,
) -> Any:
    """factor: multiplies the keys of landmarks, its inverse all other keys."""

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        q, k, v = (
            torch.randn(shape, generator=g)
            for shape in ((b, tokens, h, d), (b, tokens, hk, d), (b, tokens, hk, dv))
        )
        k /= factor
        block = options["block"]
        k[:, block - 1 :: block] *= factor**2
        return tuple(t.to(dtype) for t in (q, k, v)), {"return_lse": True} | options

    return make


SAMPLES = (
    Sample("blocks of 16", landmark_call(block=16)),
    Sample("several blocks a tile", landmark_call(h=3, hk=3, d=24, dv=40, block=5)),
    Sample("one ordinary key a block", landmark_call(tokens=33, b=1, block=2)),
    Sample("a tile a block", landmark_call(tokens=130, b=1, h=2, hk=1, block=64)),
    Sample("a block of several tiles", landmark_call(tokens=330, b=1, h=1, hk=1, d=16, block=150)),
    Sample("whole blocks", landmark_call(tokens=96, b=1, h=2, block=48)),
    Sample("no landmark", landmark_call(block=71)),
    Sample("a block without end", landmark_call(tokens=20, block=2**31 - 1)),
    Sample("scale", landmark_call(tokens=40, b=1, block=8, scale=0.5)),
    Sample("loud landmarks", landmark_call(tokens=50, b=1, block=10, factor=4.0)),
    Sample("quiet landmarks", landmark_call(tokens=50, b=1, block=10, factor=0.1)),
    Sample("wide heads", landmark_call(tokens=45, b=1, d=200, dv=136, block=20)),
    Sample("one token", landmark_call(tokens=1, block=2)),
    Sample("no tokens", landmark_call(tokens=0, block=4)),
    Sample("no requests", landmark_call(b=0, block=16)),
)
