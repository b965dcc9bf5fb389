"""Malformed calls of gather_tokens."""

from __future__ import annotations

import torch
from malformed import refused, refused_values
from malformed.rules import dtype, out, shared

CALLS = (
    refused("x: must have 3 dimensions [B, N, C]; got 5", xs=lambda t: t[None, None]),
    refused("x: must be float16, bfloat16, float32, int32 or int64; got bool", xs=lambda t: t > 0),
    refused("x: must have a contiguous last dimension", xs=lambda t: t.transpose(1, 2)),
    refused("indices: must have shape [2, K], or [K]; got [1, 9]", indices=lambda t: t[:1]),
    *dtype("indices", "must be int32", "int16"),
    *out([2, 9, 24], [2, 8, 24], "must be float32"),
    shared("out", "x", [312, 24, 1], lambda call: call.update(out=call["xs"][:, 4:])),
    refused_values("indices: must be -1 to 12; got 13", indices=lambda t: torch.full_like(t, 13)),
    refused_values(
        "indices: must be -1 to 12; got -2147483648",
        indices=lambda t: torch.full_like(t, -(2**40), dtype=torch.int64),
    ),
)
