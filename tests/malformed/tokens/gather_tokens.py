"""Malformed calls of gather_tokens."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

CALLS = (
    Malformed(
        "rank",
        "x: must have 3 dimensions [B, N, C]; got 5",
        set_argument(0, lambda t: t[None, None]),
    ),
    Malformed(
        "dtype",
        "x: must be float16, bfloat16, float32, int32 or int64; got bool",
        set_argument(0, lambda t: t > 0),
    ),
    Malformed(
        "layout",
        "x: must have a contiguous last dimension",
        set_argument(0, lambda t: t.transpose(1, 2)),
    ),
    Malformed(
        "batch",
        "indices: must have shape [2, K], or [K]; got [1, 9]",
        set_argument(1, lambda t: t[:1]),
    ),
    Malformed(
        "dtype of indices",
        "indices: must be int32; got int16",
        set_argument(1, lambda t: t.short()),
    ),
    Malformed(
        "shape of out",
        "out: must have shape [2, 9, 24]; got [2, 8, 24]",
        set_options(out=torch.zeros(2, 8, 24)),
    ),
    Malformed(
        "dtype of out",
        "out: must be float32; got float16",
        set_options(out=torch.zeros(2, 9, 24, dtype=torch.float16)),
    ),
    Malformed(
        "expanded out",
        "out: must have each element at an address of its own; strides; got [0, 24, 1]",
        set_options(out=torch.zeros(9, 24).expand(2, 9, 24)),
    ),
    Malformed(
        "out over x",
        "out: must not share memory with x; strides; got [312, 24, 1]",
        lambda a, k: k.update(out=a[0][:, 4:]),
    ),
    Malformed(
        "beyond the end",
        "indices: must be -1 to 12; got 13",
        set_argument(1, lambda t: torch.full_like(t, 13)),
        values=True,
    ),
    Malformed(
        "below -1",
        "indices: must be -1 to 12; got -2147483648",
        set_argument(1, lambda t: torch.full_like(t, -(2**40), dtype=torch.int64)),
        values=True,
    ),
)
