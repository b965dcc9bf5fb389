"""Malformed calls of transpose_block_list."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument

CALLS = (
    Malformed(
        "rank",
        "indices: must have shape [B, heads, rows, K]; got [3, 9, 5]",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "shape of counts",
        "counts: must have shape [2, 3, 9]; got [2, 3, 8]",
        set_argument(1, lambda t: t[:, :, :8]),
    ),
    Malformed("dtype", "indices: must be int32; got int64", set_argument(0, torch.Tensor.long)),
    Malformed(
        "layout",
        "indices: must have a contiguous last dimension",
        set_argument(0, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    ),
    Malformed("blocks", "num_blocks: must be 0 to 2^30; got -1", set_argument(2, lambda n: -1)),
)
