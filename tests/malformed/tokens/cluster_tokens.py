"""Malformed calls of cluster_tokens."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

CALLS = (
    Malformed(
        "rank", "x: must have 4 dimensions [B, Y, X, C]; got 3", set_argument(0, lambda t: t[0])
    ),
    Malformed(
        "dtype",
        "x: must be float16, bfloat16 or float32; got int32",
        set_argument(0, torch.Tensor.int),
    ),
    Malformed(
        "layout",
        "x: must have a contiguous last dimension",
        set_argument(0, lambda t: t.mT.contiguous().mT),
    ),
    Malformed(
        "channels", "x: must have 1 to 4096 channels; got 0", set_argument(0, lambda t: t[..., :0])
    ),
    Malformed("no cells", "grid: must be 1 to 7 along Y; got 0", set_argument(1, lambda g: (0, 3))),
    Malformed(
        "too many cells", "grid: must be 1 to 8 along X; got 9", set_argument(1, lambda g: (2, 9))
    ),
    Malformed(
        "three sides",
        "grid: must be an integer or two; got [1, 2, 3]",
        set_argument(1, lambda g: (1, 2, 3)),
    ),
    Malformed("iters", "iters: must be 1 to 1000; got 0", set_options(iters=0)),
    Malformed(
        "many iters", "iters: must be 1 to 1000; got 1099511627776", set_options(iters=2**40)
    ),
    Malformed("tau", "tau: must be finite and at least 0; got -1", set_options(tau=-1.0)),
    Malformed("window", "window: must be odd and at least 1; got 4", set_options(window=4)),
)
