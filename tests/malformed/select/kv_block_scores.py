"""Malformed calls of kv_block_scores."""

from __future__ import annotations

import torch
from malformed import refused
from malformed.rules import (
    OR_FLOAT8,
    cache_scales,
    float8,
    forced,
    keys,
    layout,
    option,
    queries,
    rank,
    scale,
    table_of_queries,
    tensor,
)
from torch import zeros

_BOXES = zeros(2, 5, 2, 3, 32)

# Edits of the first sample: q [2, 3, 4, 32], k [2, 50, 2, 32].
CALLS = (
    *option("scoring", "must be 'dot', 'minmax' or 'max_block'", "sum"),
    *queries([2, 3, 4, 32]),
    rank("k", "[B, N, H, D] or [pages, page_size, H, D]"),
    rank("k", "[B, N, H, 2, D] or [pages, page_size, H, 2, D]", scoring="minmax"),
    layout("k"),
    *keys([2, 3, 4, 32], [2, 50, 2, 32], also=OR_FLOAT8),
    refused(
        "k: must have the dtype of q, float32; got float8_e4m3fn",
        scoring="minmax",
        k=_BOXES.to(torch.float8_e4m3fn),
    ),
    refused(
        "k: must have 2 rows for each block, minimum and maximum; got 3", k=_BOXES, scoring="minmax"
    ),
    *cache_scales("k_scale", [2, 50, 2], float8("k")),
    *table_of_queries(2),
    *option("block_k", "must be 1 to 2^31 - 1", 0),
    *option("block_q", "must be 1 to 2^31 - 1", -1),
    *option("block_q", "must be 1 with q_reduce 'none'", 4),
    *option("q_reduce", "must be 'none', 'mean' or 'max'", "sum"),
    *option("head_reduce", "must be 'none', 'group_max', 'group_mean' or 'softmax_vote'", "max"),
    *scale(),
    *forced(),
    *tensor("seqlens_k", "[2]", [3], "int32"),
)
