"""Malformed calls of reconstruct_tokens."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

CALLS = (
    Malformed(
        "rank", "features: must have 3 dimensions [B, N, C]; got 2", set_argument(0, lambda t: t[0])
    ),
    Malformed(
        "dtype",
        "features: must be float16, bfloat16 or float32; got int32",
        set_argument(0, torch.Tensor.int),
    ),
    Malformed(
        "layout",
        "values: must have a contiguous last dimension",
        set_argument(2, lambda t: t.mT.contiguous().mT),
    ),
    Malformed(
        "other dtype",
        "centroids: must have the dtype of features, float32; got float16",
        set_argument(1, torch.Tensor.half),
    ),
    Malformed(
        "batch",
        "values: must have the batch size of features, 2; got 1",
        set_argument(2, lambda t: t[:1]),
    ),
    Malformed(
        "no channels",
        "features: must have 1 to 4096 channels; got 0",
        set_argument(0, lambda t: t[..., :0]),
    ),
    Malformed(
        "channels",
        "centroids: must have the channels of features, 20; got 19",
        set_argument(1, lambda t: t[..., 1:]),
    ),
    Malformed(
        "rows",
        "values: must have a row for each centroid, 21; got 20",
        set_argument(2, lambda t: t[:, 1:]),
    ),
    Malformed("k", "k: must be 1 to 21, the number of centroids; got 22", set_options(k=22)),
    Malformed("tau", "tau: must be finite and at least 0; got -1", set_options(tau=-1.0)),
    Malformed("norm", "norm: must be 'l1' or 'l2'; got 'l3'", set_options(norm="l3")),
)
