"""Malformed calls of mask_partition."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

CALLS = (
    Malformed(
        "rank",
        "mask: must have 2 dimensions [B, N]; got 1",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed("dtype", "mask: must be bool; got int32", set_argument(0, lambda t: t.int())),
    Malformed(
        "layout",
        "mask: must have a contiguous last dimension",
        set_argument(0, lambda t: t.t()),
    ),
    Malformed(
        "negative total",
        "max_total: must be 0 to 2^31 - 1; got -1",
        set_options(max_total=-1),
    ),
    Malformed(
        "total",
        "max_total: must be at least the number of tokens taken, 201; got 150",
        set_argument(0, torch.ones_like),
        values=True,
    ),
)
