"""Malformed calls of scatter_tokens."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument

CALLS = (
    Malformed(
        "rank",
        "y: must have 3 dimensions [B, K, C], or 2 [K, C]; got 5",
        set_argument(0, lambda t: t[None, None]),
    ),
    Malformed(
        "dtype",
        "y: must be float16, bfloat16, float32, int32 or int64; got bool",
        set_argument(0, lambda t: t > 0),
    ),
    Malformed(
        "shape of indices",
        "indices: must have shape [2, 9]; got [2, 8]",
        set_argument(1, lambda t: t[:, 1:]),
    ),
    Malformed(
        "dtype of indices",
        "indices: must be int32; got int16",
        set_argument(1, lambda t: t.short()),
    ),
    Malformed(
        "tokens",
        "base: must have 0 to 2^31 - 1 tokens; got -1",
        set_argument(2, lambda t: -1),
    ),
    Malformed(
        "batch",
        "base: must have the batch size of y, 2; got 1",
        set_argument(2, lambda t: t[:1]),
    ),
    Malformed(
        "channels",
        "base: must have shape [2, 13, 24]; got [2, 13, 23]",
        set_argument(2, lambda t: t[..., 1:]),
    ),
    Malformed(
        "dtype of base",
        "base: must be float32; got float16",
        set_argument(2, lambda t: t.half()),
    ),
    Malformed(
        "beyond the end",
        "indices: must be -1 to 12; got 13",
        set_argument(1, lambda t: torch.full_like(t, 13)),
        values=True,
    ),
    Malformed(
        "twice",
        "indices: must not name a token twice; got 4",
        set_argument(1, lambda t: torch.full_like(t, 4)),
        values=True,
    ),
)
