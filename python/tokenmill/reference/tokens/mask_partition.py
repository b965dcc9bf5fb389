"""mask_partition: the positions of true elements in the flattened mask, ascending, then -1; the
offset of each row in them; and place[b, n], the number of true elements before a true one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mask_partition(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """mask [B, N]: indices [max_total], cu_seqlens [B + 1], place [B, N]."""
    batch, tokens = a.mask.shape
    size = batch * tokens if a.max_total is None else a.max_total
    taken = a.mask.flatten().nonzero().flatten().int()
    indices = torch.nn.functional.pad(taken, (0, size - taken.shape[0]), value=-1)
    cu_seqlens = torch.nn.functional.pad(a.mask.sum(1).cumsum(0), (1, 0)).int()
    place = (a.mask.flatten().cumsum(0) - 1).view(batch, tokens).int()
    return indices, cu_seqlens, place.masked_fill(~a.mask, -1)
