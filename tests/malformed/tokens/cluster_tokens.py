"""Malformed calls of cluster_tokens."""

from __future__ import annotations

from malformed import refused
from malformed.rules import FLOATS, dtype, layout, option, rank

CALLS = (
    rank("x", "[B, Y, X, C]"),
    *dtype("x", FLOATS, "int32"),
    layout("x"),
    refused("x: must have 1 to 4096 channels; got 0", x=lambda t: t[..., :0]),
    refused("grid: must be 1 to 7 along Y; got 0", grid=(0, 3)),
    refused("grid: must be 1 to 8 along X; got 9", grid=(2, 9)),
    *option("grid", "must be an integer or two", (1, 2, 3)),
    *option("iters", "must be 1 to 1000", 0, 2**40),
    *option("tau", "must be finite and at least 0", -1.0),
    *option("window", "must be odd and at least 1", 4),
)
