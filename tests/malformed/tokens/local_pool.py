"""Malformed calls of local_pool."""

from __future__ import annotations

from malformed import refused
from malformed.rules import FLOATS, dtype, layout, option, rank, tensor

CALLS = (
    rank("x", "[B, Y, X, C], or 3 [B, N, C]", got=2),
    *dtype("x", FLOATS, "int32"),
    layout("x"),
    *tensor("mask", "[2, 5, 6]", [2, 5, 5], "bool", "int32"),
    *option("kernel", "must be odd, 1 to 255", 2),
    refused("dilation: must be 0 to 65535; got -1", dilation=(1, -1)),
    *option("mode", "must be 'avg' or 'max'", "mean"),
)
