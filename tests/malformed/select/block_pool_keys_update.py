"""Malformed calls of block_pool_keys_update."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options
from malformed.select.block_pool_keys import COMMON

CALLS = (
    *COMMON,
    Malformed(
        "start",
        "start: must have shape [2]; got [1]",
        set_options(start=torch.zeros(1, dtype=torch.int32)),
    ),
    Malformed(
        "shape of pooled",
        "pooled: must have shape [2, 4, 2, 16]; got [2, 4, 2, 15]",
        set_argument(1, lambda t: t[..., 1:]),
    ),
    Malformed(
        "dtype of pooled",
        "pooled: must have the dtype of k, float32; got float16",
        set_argument(1, lambda t: t.half()),
    ),
    Malformed(
        "expanded pooled",
        "pooled: must have each element at an address of its own; strides; got [128, 0, ",
        set_argument(1, lambda t: t[:, :1].expand(-1, 4, -1, -1)),
    ),
    Malformed(
        "pooled over k",
        "pooled: must not share memory with k; strides; got [1600, 32, 16, 1]",
        lambda a, k: a.__setitem__(1, a[0][:, :4]),
    ),
)
