"""Malformed calls of merge_attention_states."""

from __future__ import annotations

from malformed import Malformed, set_argument

CALLS = (
    Malformed(
        "rank",
        "outs: must have 5 dimensions [n, B, S, H, D] or 4 [n, T, H, D]; got 3",
        set_argument(0, lambda t: t[0, 0]),
    ),
    Malformed(
        "dtype",
        "outs: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "layout",
        "outs: must have a contiguous last dimension",
        set_argument(0, lambda t: t.transpose(-1, -2)),
    ),
    Malformed(
        "no parts",
        "outs: must hold at least one part; got 0",
        set_argument(0, lambda t: t[:0]),
    ),
    Malformed(
        "lse shape",
        "lses: must have shape [4, 2, 3, 9]; got [4, 2, 9, 3]",
        set_argument(1, lambda t: t.transpose(-1, -2)),
    ),
    Malformed(
        "lse dtype",
        "lses: must be float32; got float16",
        set_argument(1, lambda t: t.half()),
    ),
)
