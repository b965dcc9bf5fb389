"""Malformed calls of segment_reduce."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

# Edits of the first sample.
CALLS = (
    Malformed(
        "rank",
        "x: must have 3 dimensions [B, N, C] or 2 [T, C]; got 1",
        set_argument(0, lambda t: t[0, 0]),
    ),
    Malformed(
        "packed with offsets of a batch",
        "offsets: must have 1 dimension with x [T, C]; got 2",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "dtype",
        "x: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "layout",
        "x: must have a contiguous last dimension",
        set_argument(0, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    ),
    Malformed(
        "batch of offsets",
        "offsets: must have shape [2, S + 1]; got [1, 7]",
        set_argument(1, lambda t: t[:1]),
    ),
    Malformed(
        "dtype of offsets", "offsets: must be int32; got int64", set_argument(1, torch.Tensor.long)
    ),
    Malformed(
        "batch of perm",
        "perm: must have shape [2, K]; got [2]",
        set_options(perm=torch.zeros(2, dtype=torch.int32)),
    ),
    Malformed(
        "reduce",
        "reduce: must be 'sum', 'mean', 'amax', 'amin', 'first' or 'last'; got 'max'",
        set_options(reduce="max"),
    ),
    Malformed(
        "shape of weight",
        "weight: must have shape [2, 37]; got [2, 36]",
        set_options(weight=torch.ones(2, 36)),
    ),
    Malformed(
        "type of weight",
        "weight: must be of a floating type; got int64",
        set_options(weight=torch.ones(2, 37, dtype=torch.int64)),
    ),
    Malformed(
        "weight of an extreme",
        "weight: requires reduce 'sum' and 'mean'; got 'amax'",
        set_options(reduce="amax"),
    ),
    Malformed(
        "offset",
        "offsets: must be 0 to 40; got 41",
        set_argument(1, lambda t: t.where(t < t.amax(), 41)),
        values=True,
    ),
    Malformed(
        "decreasing offsets",
        "offsets: must not decrease; got",
        set_argument(1, lambda t: t.flip(1).contiguous()),
        values=True,
    ),
    Malformed(
        "row of perm",
        "perm: must be -1 to 36; got 37",
        set_options(perm=torch.full((2, 40), 37, dtype=torch.int32)),
        values=True,
    ),
    Malformed(
        "row twice",
        "perm: must not name a token twice; got 5",
        set_options(perm=torch.full((2, 40), 5, dtype=torch.int32)),
        values=True,
    ),
)
