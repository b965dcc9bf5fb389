"""Malformed calls of gather_fuse."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

CALLS = (
    Malformed(
        "rank",
        "x: must have 3 dimensions [B, N, C]; got 2",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "dtype",
        "x: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "prefix",
        "prefix: must be 0 to the number of tokens, 14; got 15",
        set_options(prefix=15),
    ),
    Malformed(
        "batch of keep",
        "keep: must have shape [2, K]; got [1, 7]",
        set_argument(1, lambda t: t[:1]),
    ),
    Malformed(
        "dtype of rest",
        "rest: must be int32; got int16",
        set_argument(2, lambda t: t.short()),
    ),
    Malformed(
        "shape of weight",
        "weight: must have shape [2, 13]; got [2, 12]",
        set_argument(3, lambda t: t[:, 1:]),
    ),
    Malformed(
        "dtype of weight",
        "weight: must be float32; got int64",
        set_argument(3, lambda t: t.long()),
    ),
    Malformed(
        "shape of out",
        "out: must have shape [2, 9, 24]; got [2, 8, 24]",
        set_options(out=torch.zeros(2, 8, 24)),
    ),
    Malformed(
        "expanded out",
        "out: must have each element at an address of its own; strides; got [0, 24, 1]",
        set_options(out=torch.zeros(9, 24).expand(2, 9, 24)),
    ),
    Malformed(
        "out over x",
        "out: must not share memory with x; strides; got [336, 24, 1]",
        lambda a, k: k.update(out=a[0][:, 5:]),
    ),
    Malformed(
        "beyond the end",
        "keep: must be -1 to 12; got 13",
        set_argument(1, lambda t: torch.full_like(t, 13)),
        values=True,
    ),
    Malformed(
        "in both",
        "rest: must not name a token twice; got 3",
        lambda a, k: (
            a.__setitem__(1, torch.tensor([[3], [4]])),
            a.__setitem__(2, torch.tensor([[3], [5]])),
        )[0],
        values=True,
    ),
)
