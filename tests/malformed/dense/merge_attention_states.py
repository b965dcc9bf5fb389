"""Malformed calls of merge_attention_states."""

from __future__ import annotations

from malformed import Malformed

CALLS = (
    Malformed(
        "rank",
        "outs: must have 5 dimensions [n, B, S, H, D] or 4 [n, T, H, D]; got 3",
        lambda a, k: a.__setitem__(0, a[0][0, 0]),
    ),
    Malformed(
        "dtype",
        "outs: must be float16, bfloat16 or float32; got int32",
        lambda a, k: a.__setitem__(0, a[0].int()),
    ),
    Malformed(
        "layout",
        "outs: must have a contiguous last dimension",
        lambda a, k: a.__setitem__(0, a[0].transpose(-1, -2)),
    ),
    Malformed(
        "no parts",
        "outs: must hold at least one part; got 0",
        lambda a, k: a.__setitem__(0, a[0][:0]),
    ),
    Malformed(
        "lse shape",
        "lses: must have shape [4, 2, 3, 9]; got [4, 2, 9, 3]",
        lambda a, k: a.__setitem__(1, a[1].transpose(-1, -2)),
    ),
    Malformed(
        "lse dtype",
        "lses: must be float32; got float16",
        lambda a, k: a.__setitem__(1, a[1].half()),
    ),
)
