"""Malformed calls of attention_row_scores."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, set_argument, set_options


def _with_lse(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Any:
    return set_options(lse=torch.zeros(shape, dtype=dtype))


CALLS = (
    Malformed(
        "rank",
        "q: must have 4 dimensions [B, S, H, D]; got 3",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "heads",
        "k: number of heads must divide that of q, 3 (GQA); got 2",
        set_argument(1, lambda t: t[:, :, 1:]),
    ),
    Malformed("lse shape", "lse: must have shape [2, 3, 1]; got [2, 3]", _with_lse((2, 3))),
    Malformed(
        "scale",
        "scale: must be at most 2^127 in size; got nan",
        set_options(scale=float("nan")),
    ),
    Malformed(
        "reduce",
        "reduce: must be 'none', 'sum', 'mean', 'max' or 'argmax'; got 'min'",
        set_options(reduce="min"),
    ),
    Malformed(
        "skip",
        "skip: must be 0 to the number of keys, 197; got 198",
        set_options(skip=198),
    ),
    Malformed(
        "shape of seqlens_k",
        "seqlens_k: must have shape [2]; got [1]",
        set_options(seqlens_k=torch.zeros(1, dtype=torch.int32)),
    ),
    Malformed(
        "too long",
        "seqlens_k: must be 0 to 197; got 198",
        set_options(seqlens_k=torch.full((2,), 198, dtype=torch.int32)),
        values=True,
    ),
)
