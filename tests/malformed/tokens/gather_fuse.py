"""Malformed calls of gather_fuse."""

from __future__ import annotations

import torch
from malformed import ints, refused, refused_values
from malformed.rules import FLOATS, TOKENS, dtype, option, out, rank, shared

CALLS = (
    rank("x", TOKENS),
    *dtype("x", FLOATS, "int32"),
    *option("prefix", "must be 0 to the number of tokens, 14", 15),
    refused("keep: must have shape [2, K]; got [1, 7]", keep=lambda t: t[:1]),
    *dtype("rest", "must be int32", "int16"),
    refused("weight: must have shape [2, 13]; got [2, 12]", weight=lambda t: t[:, 1:]),
    *dtype("weight", "must be float32", "int64"),
    *out([2, 9, 24], [2, 8, 24], "must be float32"),
    shared("out", "x", [336, 24, 1], lambda call: call.update(out=call["x"][:, 5:])),
    refused_values("keep: must be -1 to 12; got 13", keep=lambda t: torch.full_like(t, 13)),
    refused_values(
        "rest: must not name a token twice; got 3",
        keep=ints([3], [4], dtype=torch.int64),
        rest=ints([3], [5], dtype=torch.int64),
    ),
)
