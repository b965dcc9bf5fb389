"""Malformed calls of query_similarity_gate."""

from __future__ import annotations

from malformed import Malformed, set_argument

CALLS = (
    Malformed(
        "rank",
        "q: must have 4 dimensions [B, S, H, D]; got 3",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "dtype of q_ref",
        "q_ref: must have the dtype of q, float32; got float16",
        set_argument(1, lambda t: t.half()),
    ),
    Malformed(
        "layout",
        "q_ref: must have a contiguous last dimension",
        set_argument(1, lambda t: t.expand(5, 2, 4, 32).transpose(2, 3)),
    ),
    Malformed(
        "heads",
        "q_ref: must have the B, H and D of q, [5, 4, 32]; got [5, 3, 32]",
        set_argument(1, lambda t: t[:, :, 1:]),
    ),
)
