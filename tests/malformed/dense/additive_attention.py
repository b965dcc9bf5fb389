"""Malformed calls of additive_attention."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

CALLS = (
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "rank",
        "q: must have 3 dimensions [B, T, A]; got 2",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "dtype of k",
        "k: must have the dtype of q, float32; got float16",
        set_argument(1, lambda t: t.half()),
    ),
    Malformed(
        "width of k",
        "k: must have shape [2, N, 20]; got [2, 21, 19]",
        set_argument(1, lambda t: t[..., :19]),
    ),
    Malformed(
        "v_weight",
        "v_weight: must have shape [20]; got [19]",
        set_argument(2, lambda t: t[:19]),
    ),
    Malformed(
        "mask dtype",
        "mask: must be bool; got float32",
        set_options(mask=torch.ones(2, 21)),
    ),
    Malformed(
        "mask shape",
        "mask: must have shape [2, 21] or [2, 5, 21]; got [2, 5]",
        set_options(mask=torch.ones(2, 5).bool()),
    ),
)
