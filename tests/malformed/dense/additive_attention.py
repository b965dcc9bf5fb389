"""Malformed calls of additive_attention."""

from __future__ import annotations

from malformed import refused
from malformed.rules import FLOATS, dtype, rank, same_dtype, tensor

CALLS = (
    *dtype("q", FLOATS, "int32"),
    rank("q", "[B, T, A]"),
    same_dtype("k", "q"),
    refused("k: must have shape [2, N, 20]; got [2, 21, 19]", k=lambda t: t[..., :19]),
    refused("v_weight: must have shape [20]; got [19]", v_weight=lambda t: t[:19]),
    *tensor("mask", "[2, 21] or [2, 5, 21]", [2, 5], "bool", "float32"),
)
