"""Malformed calls of block_pool_keys."""

from __future__ import annotations

import torch
from malformed import Malformed, ints, set_argument, set_options

# Rules that block_pool_keys_update has too.
COMMON = (
    Malformed(
        "rank",
        "k: must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]; got 3",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "dtype",
        "k: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "layout",
        "k: must have a contiguous last dimension",
        set_argument(0, lambda t: t.transpose(1, 3)),
    ),
    Malformed("block", "block: must be 1 to 2^31 - 1; got 0", set_argument(-1, lambda _: 0)),
    Malformed(
        "mode",
        "mode: must be 'mean', 'max' or 'minmax'; got 'sum'",
        set_options(mode="sum"),
    ),
    Malformed(
        "lengths",
        "lengths: must have shape [2]; got [3]",
        set_options(lengths=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "rank of the table",
        "block_table: must have 2 dimensions [B, P]; got 1",
        set_options(block_table=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "dtype of the table",
        "block_table: must be int32; got int64",
        set_options(block_table=torch.zeros(2, 3, dtype=torch.int64)),
    ),
)

_MISSING_PAGE = Malformed(
    "missing page",
    "block_table: must hold pages below 2 up to the length; got 2",
    set_options(block_table=ints([0], [2]), lengths=None),
    values=True,
)

CALLS = (*COMMON, _MISSING_PAGE)
