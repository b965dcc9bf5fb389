"""Malformed calls of block_pool_keys."""

from __future__ import annotations

import torch
from malformed import Malformed

# Rules that block_pool_keys_update has too.
COMMON = (
    Malformed(
        "rank",
        "k: must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]; got 3",
        lambda a, k: a.__setitem__(0, a[0][0]),
    ),
    Malformed(
        "dtype",
        "k: must be float16, bfloat16 or float32; got int32",
        lambda a, k: a.__setitem__(0, a[0].int()),
    ),
    Malformed(
        "layout",
        "k: must have a contiguous last dimension",
        lambda a, k: a.__setitem__(0, a[0].transpose(1, 3)),
    ),
    Malformed("block", "block: must be 1 to 2^31 - 1; got 0", lambda a, k: a.__setitem__(-1, 0)),
    Malformed(
        "mode",
        "mode: must be 'mean', 'max' or 'minmax'; got 'sum'",
        lambda a, k: k.update(mode="sum"),
    ),
    Malformed(
        "lengths",
        "lengths: must have shape [2]; got [3]",
        lambda a, k: k.update(lengths=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "rank of the table",
        "block_table: must have 2 dimensions [B, P]; got 1",
        lambda a, k: k.update(block_table=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "dtype of the table",
        "block_table: must be int32; got int64",
        lambda a, k: k.update(block_table=torch.zeros(2, 3, dtype=torch.int64)),
    ),
)

_MISSING_PAGE = Malformed(
    "missing page",
    "block_table: must hold pages below 2 up to the length; got 2",
    lambda a, k: k.update(
        block_table=torch.tensor([[0], [2]], dtype=torch.int32), lengths=None
    ),
    values=True,
)  # fmt: skip

CALLS = (*COMMON, _MISSING_PAGE)
