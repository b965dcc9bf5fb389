"""Malformed calls of attention_column_scores."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options


def _negative_seed(args: list[Any], kwargs: dict[str, Any]) -> None:
    args.pop()
    kwargs.update(gumbel_tau=1.0, seed=-1)


# Edits of the first sample: q [2, 70, 4, 32], k [2, 70, 2, 32], lse [2, 4, 70].
CALLS = (
    Malformed(
        "rank",
        "q: must have 4 dimensions [B, S, H, D]; got 3",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "head dimension",
        "k: must have the head dimension of q, 32; got 31",
        set_argument(1, lambda t: t[..., 1:]),
    ),
    Malformed(
        "heads",
        "k: number of heads must divide that of q, 4 (GQA); got 3",
        set_argument(1, lambda t: t.repeat(1, 1, 2, 1)[:, :, :3]),
    ),
    Malformed(
        "lse shape",
        "lse: must have shape [2, 4, 70]; got [2, 4, 69]",
        set_argument(2, lambda t: t[..., 1:]),
    ),
    Malformed(
        "lse with noise",
        "lse: must not be given with gumbel_tau; got [2, 4, 70]",
        set_options(gumbel_tau=1.0, seed=1),
    ),
    Malformed(
        "temperature",
        "gumbel_tau: must be positive and finite; got 0",
        set_options(gumbel_tau=0.0, seed=1),
    ),
    Malformed(
        "no seed",
        "seed: must be an integer; got None",
        set_options(gumbel_tau=1.0),
    ),
    Malformed("seed alone", "seed: requires gumbel_tau; got 5", set_options(seed=5)),
    Malformed(
        "negative seed",
        "seed: must be 0 to 2^63 - 1; got -1",
        _negative_seed,
    ),
    Malformed(
        "scale",
        "scale: must be at most 2^127 in size; got inf",
        set_options(scale=float("inf")),
    ),
    Malformed(
        "reduce",
        "reduce: must be 'sum', 'mean' or 'visible_mean'; got 'max'",
        set_options(reduce="max"),
    ),
    Malformed(
        "head_reduce",
        "head_reduce: must be 'none', 'group_mean' or 'group_max'; got 'mean'",
        set_options(head_reduce="mean"),
    ),
    Malformed(
        "window",
        "window_queries: must be at least 1; got 0",
        set_options(window_queries=0),
    ),
    Malformed(
        "shape of seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        set_options(seqlens_k=ints(1, 2, 3)),
    ),
    Malformed(
        "dtype of seqlens_q",
        "seqlens_q: must be int32; got int64",
        set_options(seqlens_q=torch.zeros(2, dtype=torch.int64)),
    ),
    Malformed(
        "too long",
        "seqlens_k: must be 0 to 70; got 71",
        set_options(seqlens_k=ints(70, 71)),
        values=True,
    ),
    Malformed(
        "negative length",
        "seqlens_q: must be 0 to 70; got -1",
        set_options(seqlens_q=ints(70, -1)),
        values=True,
    ),
)
