"""Malformed calls of scatter_tokens."""

from __future__ import annotations

import torch
from malformed import refused, refused_values
from malformed.rules import dtype, rank, same_batch

CALLS = (
    rank("y", "[B, K, C], or 2 [K, C]", got=5),
    *dtype("y", "must be float16, bfloat16, float32, int32 or int64", "bool"),
    refused("indices: must have shape [2, 9]; got [2, 8]", indices=lambda t: t[:, 1:]),
    *dtype("indices", "must be int32", "int16"),
    refused("base: must have 0 to 2^31 - 1 tokens; got -1", base=-1),
    same_batch("base", "y", 2),
    refused("base: must have shape [2, 13, 24]; got [2, 13, 23]", base=lambda t: t[..., 1:]),
    *dtype("base", "must be float32", "float16"),
    refused_values("indices: must be -1 to 12; got 13", indices=lambda t: torch.full_like(t, 13)),
    refused_values(
        "indices: must not name a token twice; got 4", indices=lambda t: torch.full_like(t, 4)
    ),
)
