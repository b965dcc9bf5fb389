"""Malformed calls of topk_select."""

from __future__ import annotations

import torch
from malformed import Malformed, set_argument, set_options

CALLS = (
    Malformed(
        "rank",
        "scores: must have 2 dimensions [R, n]; got 1",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "dtype",
        "scores: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "layout",
        "scores: must have a contiguous last dimension",
        set_argument(0, lambda t: t.t()),
    ),
    Malformed("k", "k: must be 1 to 65536; got 0", set_argument(1, lambda _: 0)),
    Malformed("wide k", "k: must be 1 to 65536", set_argument(1, lambda _: 65537)),
    Malformed("tie", "tie: must be 'low' or 'high'; got 'any'", set_options(tie="any")),
    Malformed(
        "order",
        "order: must be 'index' or 'score'; got 'value'",
        set_options(order="value"),
    ),
    Malformed(
        "negative force",
        "force_first: must not be negative; got -1",
        set_options(force_first=-1),
    ),
    Malformed(
        "force",
        "force_last: must leave force_first + force_last <= k, 17, with force_first 9; got 9",
        set_options(force_first=9, force_last=9),
    ),
    Malformed(
        "lengths",
        "lengths: must have shape [4]; got [3]",
        set_options(lengths=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "dtype of lengths",
        "lengths: must be int32; got int64",
        set_options(lengths=torch.zeros(4, dtype=torch.int64)),
    ),
    Malformed(
        "page size",
        "page_size: must be a power of two; got 12",
        set_options(page_size=12),
    ),
    Malformed(
        "rows of the block table",
        "block_table: must have a row for each row of scores, 4, without row_to_batch; got 3",
        set_options(block_table=torch.zeros(3, 2, dtype=torch.int32)),
    ),
    Malformed(
        "row_to_batch alone",
        "row_to_batch: requires block_table; got [4]",
        set_options(row_to_batch=torch.zeros(4, dtype=torch.int32)),
    ),
    Malformed(
        "rank of previous",
        "previous: must have 2 dimensions [R, K]; got 1",
        set_options(previous=torch.zeros(4, dtype=torch.int32)),
    ),
    Malformed(
        "dtype of previous",
        "previous: must be int32; got int64",
        set_options(previous=torch.zeros(4, 17, dtype=torch.int64)),
    ),
    Malformed(
        "rows of previous",
        "previous: must have a row for each row of scores, 4; got 3",
        set_options(previous=torch.zeros(3, 17, dtype=torch.int32)),
    ),
    Malformed(
        "no hints",
        "previous: must have a column; got 0",
        set_options(previous=torch.zeros(4, 0, dtype=torch.int32)),
    ),
    Malformed(
        "layout of previous",
        "previous: must have a contiguous last dimension",
        set_options(previous=torch.zeros(17, 4, dtype=torch.int32).t()),
    ),
    Malformed(
        "start",
        "row_starts: must be 0 to the number of columns, 300; got 301",
        set_options(row_starts=torch.full((4,), 301, dtype=torch.int32)),
        values=True,
    ),
    Malformed(
        "batch",
        "row_to_batch: must be below the number of rows of block_table, 2; got 2",
        set_options(
            block_table=torch.zeros(2, 2, dtype=torch.int32),
            row_to_batch=torch.full((4,), 2, dtype=torch.int32),
        ),
        values=True,
    ),
)
