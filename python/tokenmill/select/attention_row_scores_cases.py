"""Sample calls of attention_row_scores."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


def _sample(
    b: int = 2,
    r: int = 1,
    n: int = 50,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    with_lse: bool = False,
    seqlens_k: tuple[int, ...] | None = None,
    **options: Any,
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q = torch.randn(b, r, h, d, generator=g).to(dtype)
        k = torch.randn(b, n, hk, d, generator=g).to(dtype)
        given = dict(options)
        if seqlens_k is not None:
            given["seqlens_k"] = torch.tensor(seqlens_k, dtype=torch.int32)
        if with_lse:
            lse = 4 + torch.rand(b, h, r, generator=g)
            lse[..., 0, 0] = float("-inf")
            given["lse"] = lse.to(torch.promote_types(dtype, torch.float32))
        return (q, k), given

    return make


SAMPLES = (
    Sample("class token", _sample(n=197, h=3, hk=3, d=64, skip=1)),
    Sample("lse", _sample(r=2, with_lse=True, reduce="sum")),
    Sample("last queries", _sample(r=5, n=40, causal=True, reduce="max")),
    Sample("each row", _sample(b=1, r=3, d=20, causal=True, reduce="none", skip=4)),
    Sample(
        "largest of each row",
        _sample(b=3, r=5, n=60, causal=True, reduce="argmax", skip=3, seqlens_k=(60, 2, 5)),
    ),
    Sample(
        "seqlens_k",
        _sample(b=4, r=3, seqlens_k=(50, 0, 2, 33), causal=True),
    ),
    Sample("many heads", _sample(b=1, h=20, hk=1, n=33, d=16)),
    Sample("wide heads", _sample(b=1, n=40, d=200, scale=0.05)),
    Sample("odd head", _sample(b=1, n=37, d=7, h=3, hk=3)),
    Sample("all skipped", _sample(skip=50)),
    Sample("no rows", _sample(r=0)),
    Sample("no keys", _sample(n=0)),
    Sample("no requests", _sample(b=0)),
)
