"""Malformed calls of merge_attention_states."""

from __future__ import annotations

from malformed import refused
from malformed.rules import FLOATS, dtype, layout, rank, tensor

CALLS = (
    rank("outs", "[n, B, S, H, D] or 4 [n, T, H, D]", got=3),
    *dtype("outs", FLOATS, "int32"),
    layout("outs"),
    refused("outs: must hold at least one part; got 0", outs=lambda t: t[:0]),
    *tensor("lses", "[4, 2, 3, 9]", [4, 2, 9, 3], "float32", "float16"),
)
