"""Malformed calls of transpose_block_list."""

from __future__ import annotations

from malformed import refused
from malformed.rules import dtype, layout, option

CALLS = (
    refused("indices: must have shape [B, heads, rows, K]; got [3, 9, 5]", indices=lambda t: t[0]),
    refused("counts: must have shape [2, 3, 9]; got [2, 3, 8]", counts=lambda t: t[:, :, :8]),
    *dtype("indices", "must be int32", "int64"),
    layout("indices"),
    *option("num_blocks", "must be 0 to 2^30", -1),
)
