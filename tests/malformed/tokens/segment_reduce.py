"""Malformed calls of segment_reduce."""

from __future__ import annotations

import torch
from malformed import refused, refused_values
from malformed.rules import FLOATS, dtype, layout, option, rank, tensor

# Edits of the first sample.
CALLS = (
    rank("x", "[B, N, C] or 2 [T, C]", got=1),
    refused("offsets: must have 1 dimension with x [T, C]; got 2", x=lambda t: t[0]),
    *dtype("x", FLOATS, "int32"),
    layout("x"),
    refused("offsets: must have shape [2, S + 1]; got [1, 7]", offsets=lambda t: t[:1]),
    *dtype("offsets", "must be int32", "int64"),
    *tensor("perm", "[2, K]", [2], "int32"),
    *option("reduce", "must be 'sum', 'mean', 'amax', 'amin', 'first' or 'last'", "max"),
    refused("weight: must have shape [2, 37]; got [2, 36]", weight=torch.ones(2, 36)),
    *dtype("weight", "must be of a floating type", "int64"),
    refused("weight: requires reduce 'sum' and 'mean'; got 'amax'", reduce="amax"),
    refused_values("offsets: must be 0 to 40; got 41", offsets=lambda t: t.where(t < t.amax(), 41)),
    refused_values("offsets: must not decrease; got", offsets=lambda t: t.flip(1).contiguous()),
    *(
        refused_values(f"perm: {rule}", perm=torch.full((2, 40), row, dtype=torch.int32))
        for row, rule in (
            (37, "must be -1 to 36; got 37"),
            (5, "must not name a token twice; got 5"),
        )
    ),
)
