"""Malformed calls of local_pool."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

CALLS = (
    Malformed(
        "rank",
        "x: must have 4 dimensions [B, Y, X, C], or 3 [B, N, C]; got 2",
        set_argument(0, lambda t: t[0, 0]),
    ),
    Malformed(
        "dtype",
        "x: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "layout",
        "x: must have a contiguous last dimension",
        set_argument(0, lambda t: t.permute(0, 3, 1, 2)),
    ),
    Malformed(
        "shape of mask",
        "mask: must have shape [2, 5, 6]; got [2, 5, 5]",
        set_options(mask=torch.ones(2, 5, 5, dtype=torch.bool)),
    ),
    Malformed(
        "dtype of mask",
        "mask: must be bool; got int32",
        set_options(mask=torch.ones(2, 5, 6, dtype=torch.int32)),
    ),
    Malformed("even kernel", "kernel: must be odd, 1 to 255; got 2", set_argument(1, lambda k: 2)),
    Malformed("dilation", "dilation: must be 0 to 65535; got -1", set_options(dilation=(1, -1))),
    Malformed("mode", "mode: must be 'avg' or 'max'; got 'mean'", set_options(mode="mean")),
)
