"""Samples and malformed calls of attention_column_scores."""

from __future__ import annotations

from typing import Any

import torch

from ..reference.dense._common import scores, softmax, visible_pairs
from ..registry import Malformed, Sample


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


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _negative_seed(args: list[Any], kwargs: dict[str, Any]) -> None:
    args.pop()
    kwargs.update(gumbel_tau=1.0, seed=-1)


# Edits of the first sample: q [2, 70, 4, 32], k [2, 70, 2, 32], lse [2, 4, 70].
MALFORMED = (
    Malformed(
        "rank",
        "q: must have 4 dimensions [B, S, H, D]; got 3",
        lambda a, k: a.__setitem__(0, a[0][0]),
    ),
    Malformed(
        "head dimension",
        "k: must have the head dimension of q, 32; got 31",
        lambda a, k: a.__setitem__(1, a[1][..., 1:]),
    ),
    Malformed(
        "heads",
        "k: number of heads must divide that of q, 4 (GQA); got 3",
        lambda a, k: a.__setitem__(1, a[1].repeat(1, 1, 2, 1)[:, :, :3]),
    ),
    Malformed(
        "lse shape",
        "lse: must have shape [2, 4, 70]; got [2, 4, 69]",
        lambda a, k: a.__setitem__(2, a[2][..., 1:]),
    ),
    Malformed(
        "lse with noise",
        "lse: goes without gumbel_tau; got [2, 4, 70]",
        lambda a, k: k.update(gumbel_tau=1.0, seed=1),
    ),
    Malformed(
        "temperature",
        "gumbel_tau: must be positive and finite; got 0",
        lambda a, k: k.update(gumbel_tau=0.0, seed=1),
    ),
    Malformed(
        "no seed",
        "seed: must be an integer; got None",
        lambda a, k: k.update(gumbel_tau=1.0),
    ),
    Malformed(
        "seed alone", "seed: goes with gumbel_tau alone; got 5", lambda a, k: k.update(seed=5)
    ),
    Malformed(
        "negative seed",
        "seed: must be 0 to 2^63 - 1; got -1",
        _negative_seed,
    ),
    Malformed(
        "scale",
        "scale: must be at most 2^127 in size; got inf",
        lambda a, k: k.update(scale=float("inf")),
    ),
    Malformed(
        "reduce",
        "reduce: must be 'sum', 'mean' or 'visible_mean'; got 'max'",
        lambda a, k: k.update(reduce="max"),
    ),
    Malformed(
        "head_reduce",
        "head_reduce: must be 'none', 'group_mean' or 'group_max'; got 'mean'",
        lambda a, k: k.update(head_reduce="mean"),
    ),
    Malformed(
        "window",
        "window_queries: must be at least 1; got 0",
        lambda a, k: k.update(window_queries=0),
    ),
    Malformed(
        "shape of seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        lambda a, k: k.update(seqlens_k=_ints(1, 2, 3)),
    ),
    Malformed(
        "dtype of seqlens_q",
        "seqlens_q: must be int32; got int64",
        lambda a, k: k.update(seqlens_q=torch.zeros(2, dtype=torch.int64)),
    ),
    Malformed(
        "too long",
        "seqlens_k: must be 0 to 70; got 71",
        lambda a, k: k.update(seqlens_k=_ints(70, 71)),
        values=True,
    ),
    Malformed(
        "negative length",
        "seqlens_q: must be 0 to 70; got -1",
        lambda a, k: k.update(seqlens_q=_ints(70, -1)),
        values=True,
    ),
)
