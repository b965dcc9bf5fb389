"""Malformed calls of landmark_attention."""

from __future__ import annotations

from malformed import refused
from malformed.rules import option, qkv, scale

# Edits of the first sample: q [2, 70, 4, 32], k and v [2, 70, 2, 32].
CALLS = (
    *qkv([2, 70, 4, 32], [2, 70, 2, 32]),
    *option("block", "must be 2 to 2^31 - 1", 1, 2**31),
    refused("k: must have the length of q, 69; got 70", q=lambda q: q[:, 1:]),
    *scale(),
)
