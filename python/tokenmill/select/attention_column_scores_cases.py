"""Sample calls of attention_column_scores."""

from __future__ import annotations

from typing import Any

import torch

from ..reference.dense._common import scores, softmax, visible_pairs
from ..registry import Sample


def _sample(
    b: int = 2,
    sq: int = 40,
    sk: int = 40,
    h: int = 2,
    hk: int = 1,
    d: int = 32,
    with_lse: bool = False,
    seqlens_k: tuple[int, ...] | None = None,
    seqlens_q: tuple[int, ...] | None = None,
    spread: float = 1.0,
    **options: Any,
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q = (spread * torch.randn(b, sq, h, d, generator=g)).to(dtype)
        k = torch.randn(b, sk, hk, d, generator=g).to(dtype)
        given = dict(options)
        for name, values in (("seqlens_k", seqlens_k), ("seqlens_q", seqlens_q)):
            if values is not None:
                given[name] = torch.tensor(values, dtype=torch.int32)
        if not with_lse:
            return (q, k), given
        right = 0 if options.get("causal") else -1
        z = scores(q, k, d**-0.5, 0.0, None, None, None, 0.0, True)
        visible = visible_pairs(sq, sk, -1, right, q.device)
        wide = torch.promote_types(dtype, torch.float32)
        return (q, k, softmax(z, visible, None)[1].to(wide)), given

    return make


SAMPLES = (
    Sample("lse", _sample(sq=70, sk=70, h=4, hk=2, with_lse=True, causal=True)),
    Sample("no lse", _sample(causal=True, reduce="visible_mean")),
    Sample("window", _sample(sq=40, sk=90, window_queries=30, causal=True, reduce="mean")),
    Sample("groups", _sample(b=1, h=6, hk=2, d=20, head_reduce="group_mean", with_lse=True)),
    Sample("largest of a group", _sample(b=1, h=5, d=64, head_reduce="group_max", causal=True)),
    Sample(
        "seqlens_k",
        _sample(
            b=4,
            sq=50,
            sk=90,
            seqlens_k=(90, 33, 0, 61),
            seqlens_q=(50, 1, 20, 0),
            causal=True,
            reduce="visible_mean",
            window_queries=16,
        ),
    ),
    Sample("more queries than keys", _sample(sq=60, sk=30, causal=True, with_lse=True)),
    Sample("noise", _sample(b=1, sq=33, sk=50, gumbel_tau=1.3, seed=2**40 + 7, causal=True)),
    Sample(
        "noise and lengths",
        _sample(
            b=3,
            sq=20,
            sk=64,
            d=16,
            gumbel_tau=0.7,
            seed=3,
            seqlens_k=(64, 20, 5),
            seqlens_q=(20, 20, 9),
            reduce="mean",
            causal=True,
        ),
    ),
    Sample("one query", _sample(b=1, sq=1, sk=200, h=3, d=64)),
    Sample("wide heads", _sample(b=1, sk=60, d=200, scale=0.05)),
    Sample("steep", _sample(b=1, d=128, spread=6.0, causal=True)),
    Sample("odd head", _sample(b=1, sq=20, sk=30, hk=2, d=7, scale=-0.3)),
    Sample("no queries", _sample(sq=0, sk=12, reduce="mean")),
    Sample("no keys", _sample(sq=12, sk=0)),
    Sample("no requests", _sample(b=0)),
)
