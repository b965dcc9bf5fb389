"""block_pool_keys: block b is the mean, the maximum, or minimum and maximum of the keys
b block <= j < min((b + 1) block, length); a block without keys is 0, -inf, or (inf, -inf).

block_pool_keys_update: the same for blocks with start // block <= b and b block < length; other
blocks are unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import lengths_of, rows_of


def block_pool_keys(a: Any) -> tuple[Tensor]:
    keys = rows_of(a.k, a.block_table)
    return (pool(keys, a.block, a.pooling, a.lengths),)


def block_pool_keys_update(a: Any) -> tuple[Tensor]:
    keys = rows_of(a.k, a.block_table)
    whole = pool(keys, a.block, a.pooling, a.lengths)
    first = a.start.long().clamp(min=0)[:, None]
    end = lengths_of(a.lengths, len(keys), keys.shape[1], keys.device)[:, None]
    number = torch.arange(a.pooled.shape[1], device=a.k.device)
    touched = (first < end) & (number >= first // a.block) & (number * a.block < end)
    shape = (*touched.shape, *[1] * (a.pooled.dim() - 2))
    a.pooled.copy_(torch.where(touched.view(shape), whole, a.pooled))
    return (a.pooled,)


def pool(keys: Tensor, block: int, pooling: str, lengths: Tensor | None) -> Tensor:
    """Pooled blocks [B, blocks, H, D], or [B, blocks, H, 2, D], of the first lengths[b] of the keys
    [B, S, H, D]; None: all.
    """
    batch, tokens = keys.shape[:2]
    length = lengths_of(lengths, batch, tokens, keys.device)
    block = min(block, max(tokens, 1))
    blocks = -(-tokens // block)
    padded = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, blocks * block - tokens))
    padded = padded.unflatten(1, (blocks, block))
    token = torch.arange(blocks * block, device=keys.device).view(blocks, block)
    valid = (token < length[:, None, None])[..., None, None]
    if pooling == "mean":
        wide = torch.promote_types(keys.dtype, torch.float32)
        total = torch.where(valid, padded, 0).sum(2, dtype=wide)
        return (total / valid.sum(2).clamp(min=1)).to(keys.dtype)
    maximum = torch.where(valid, padded, -torch.inf).amax(2)
    if pooling == "max":
        return maximum
    return torch.stack((torch.where(valid, padded, torch.inf).amin(2), maximum), 3)
