"""Malformed calls of best_match."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

CALLS = (
    Malformed(
        "rank", "a: must have 3 dimensions [B, N, C]; got 2", set_argument(0, lambda t: t[0])
    ),
    Malformed(
        "dtype",
        "a: must be float16, bfloat16 or float32; got int32",
        set_argument(0, torch.Tensor.int),
    ),
    Malformed(
        "layout",
        "b: must have a contiguous last dimension",
        set_argument(1, lambda t: t.mT.contiguous().mT),
    ),
    Malformed(
        "other dtype",
        "b: must have the dtype of a, float32; got float16",
        set_argument(1, torch.Tensor.half),
    ),
    Malformed(
        "no channels",
        "a: must have 1 to 4096 channels; got 0",
        set_argument(0, lambda t: t[:, :, :0]),
    ),
    Malformed(
        "batch", "b: must have the batch size of a, 2; got 1", set_argument(1, lambda t: t[:1])
    ),
    Malformed(
        "channels",
        "b: must have the channels of a, 12; got 11",
        set_argument(1, lambda t: t[:, :, 1:]),
    ),
    Malformed("normalize", "normalize: must be a bool; got 1", set_options(normalize=1)),
)
