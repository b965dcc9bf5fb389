"""block_pool_keys_update: pooled_b = block_pool_keys(k)_b where
start // block <= b and b block < length; other blocks are unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import lengths_of, rows_of
from .block_pool_keys import block_pool_keys


def block_pool_keys_update(
    k: Tensor,
    pooled: Tensor,
    block: int,
    mode: str,
    start: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor]:
    (whole,) = block_pool_keys(k, block, mode, lengths, block_table)
    tokens = rows_of(k, block_table).shape[1]
    length = lengths_of(lengths, len(start), tokens, k.device)[:, None]
    first = start.long().clamp(min=0)[:, None]
    number = torch.arange(pooled.shape[1], device=k.device)
    touched = (first < length) & (number >= first // block) & (number * block < length)
    shape = (*touched.shape, *[1] * (pooled.dim() - 2))
    pooled.copy_(torch.where(touched.view(shape), whole, pooled))
    return (pooled,)
