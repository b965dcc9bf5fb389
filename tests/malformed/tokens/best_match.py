"""Malformed calls of best_match."""

from __future__ import annotations

from malformed import refused
from malformed.rules import FLOATS, TOKENS, dtype, layout, option, rank, same_batch, same_dtype

CALLS = (
    rank("a", TOKENS),
    *dtype("a", FLOATS, "int32"),
    layout("b"),
    same_dtype("b", "a"),
    refused("a: must have 1 to 4096 channels; got 0", a=lambda t: t[..., :0]),
    same_batch("b", "a", 2),
    refused("b: must have the channels of a, 12; got 11", b=lambda t: t[..., 1:]),
    *option("normalize", "must be a bool", 1),
)
