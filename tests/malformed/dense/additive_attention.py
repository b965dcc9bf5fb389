"""Malformed calls of additive_attention."""

from __future__ import annotations

import torch
from malformed import Malformed

CALLS = (
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int32",
        lambda a, k: a.__setitem__(0, a[0].int()),
    ),
    Malformed(
        "rank",
        "q: must have 3 dimensions [B, T, A]; got 2",
        lambda a, k: a.__setitem__(0, a[0][0]),
    ),
    Malformed(
        "dtype of k",
        "k: must have the dtype of q, float32; got float16",
        lambda a, k: a.__setitem__(1, a[1].half()),
    ),
    Malformed(
        "width of k",
        "k: must have shape [2, N, 20]; got [2, 21, 19]",
        lambda a, k: a.__setitem__(1, a[1][..., :19]),
    ),
    Malformed(
        "v_weight",
        "v_weight: must have shape [20]; got [19]",
        lambda a, k: a.__setitem__(2, a[2][:19]),
    ),
    Malformed(
        "mask dtype",
        "mask: must be bool; got float32",
        lambda a, k: k.update(mask=torch.ones(2, 21)),
    ),
    Malformed(
        "mask shape",
        "mask: must have shape [2, 21] or [2, 5, 21]; got [2, 5]",
        lambda a, k: k.update(mask=torch.ones(2, 5).bool()),
    ),
)
