"""Malformed calls of topk_partition."""

from __future__ import annotations

import torch
from malformed import refused, refused_values
from malformed.rules import FLOATS, dtype, layout, option, rank, tensor

CALLS = (
    rank("scores", "[B, N]"),
    *dtype("scores", FLOATS, "int32"),
    layout("scores"),
    *option("k", "must be 0 to N, 197", 198, -1),
    *option("max_k", "requires a tensor k", 60),
    refused("k: must have shape [3]; got [2]", k=torch.tensor([5, 6])),
    refused("k: must be int32; got float32", k=torch.ones(3)),
    *option("max_k", "must be 0 to N, 197", 198, k=torch.tensor([5, 5, 5])),
    refused_values("k: must be 5 to 60; got 61", k=torch.tensor([60, 5, 61]), max_k=60),
    refused_values("k: must be 5 to 197; got 4", k=torch.tensor([5, 4, 9])),
    *option("order", "must be 'score' or 'index'", "value"),
    *tensor("valid", "[3, 197]", [3, 196], "bool", "float32"),
    *option("protect_first", "must not be negative", -1),
    *option(
        "protect_last",
        "must leave protect_first + protect_last <= k, 60, with protect_first 40",
        21,
        protect_first=40,
    ),
)
