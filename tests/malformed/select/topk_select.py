"""Malformed calls of topk_select."""

from __future__ import annotations

import torch
from malformed import ints, refused, refused_values
from malformed.rules import FLOATS, dtype, layout, option, previous, rank, tensor

_TABLE = torch.zeros(2, 2, dtype=torch.int32)

CALLS = (
    rank("scores", "[R, n]"),
    *dtype("scores", FLOATS, "int32"),
    layout("scores"),
    *option("k", "must be 1 to 65536", 0, 65537),
    *option("tie", "must be 'low' or 'high'", "any"),
    *option("order", "must be 'index' or 'score'", "value"),
    *option("force_first", "must not be negative", -1),
    *option(
        "force_last",
        "must leave force_first + force_last <= k, 17, with force_first 9",
        9,
        force_first=9,
    ),
    *tensor("lengths", "[4]", [3], "int32"),
    *option("page_size", "must be a power of two", 12),
    refused(
        "block_table: must have a row for each row of scores, 4, without row_to_batch; got 3",
        block_table=torch.zeros(3, 2, dtype=torch.int32),
    ),
    refused("row_to_batch: requires block_table; got [4]", row_to_batch=ints(0, 0, 0, 0)),
    *previous([4], "[R, K]", "row for each row of scores, 4"),
    refused_values(
        "row_starts: must be 0 to the number of columns, 300; got 301",
        row_starts=ints(301, 301, 301, 301),
    ),
    refused_values(
        "row_to_batch: must be below the number of rows of block_table, 2; got 2",
        block_table=_TABLE,
        row_to_batch=ints(2, 2, 2, 2),
    ),
)
