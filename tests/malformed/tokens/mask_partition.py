"""Malformed calls of mask_partition."""

from __future__ import annotations

import torch
from malformed import refused_values
from malformed.rules import dtype, layout, option, rank

CALLS = (
    rank("mask", "[B, N]"),
    *dtype("mask", "must be bool", "int32"),
    layout("mask"),
    *option("max_total", "must be 0 to 2^31 - 1", -1),
    refused_values(
        "max_total: must be at least the number of tokens taken, 201; got 150",
        mask=torch.ones_like,
    ),
)
