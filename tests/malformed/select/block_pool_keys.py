"""Malformed calls of block_pool_keys."""

from __future__ import annotations

import torch
from malformed import ints, refused, refused_values
from malformed.rules import FLOATS, NO_PAGE, PAGED, dtype, layout, option, rank, tensor

# Rules that block_pool_keys_update has too.
COMMON = (
    rank("k", PAGED),
    *dtype("k", FLOATS, "int32"),
    layout("k"),
    *option("block", "must be 1 to 2^31 - 1", 0),
    *option("mode", "must be 'mean', 'max' or 'minmax'", "sum"),
    *tensor("lengths", "[2]", [3], "int32"),
    rank("block_table", "[B, P]", block_table=ints(0, 0, 0)),
    refused("block_table: must be int32; got int64", block_table=torch.zeros(2, 3).long()),
)

CALLS = (
    *COMMON,
    refused_values(f"{NO_PAGE} 2", block_table=ints([0], [2]), lengths=None),
)
