"""block_pool_keys: block b is the mean, the maximum, or minimum and maximum of the keys
b block <= j < min((b + 1) block, length); a block without keys is 0, -inf, or (inf, -inf)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import lengths_of, rows_of


def block_pool_keys(
    k: Tensor, block: int, mode: str, lengths: Tensor | None, block_table: Tensor | None
) -> tuple[Tensor]:
    keys = rows_of(k, block_table)
    batch, tokens = keys.shape[:2]
    block = min(block, max(tokens, 1))
    blocks = -(-tokens // block)
    length = lengths_of(lengths, batch, tokens, k.device)
    padded = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, blocks * block - tokens))
    padded = padded.unflatten(1, (blocks, block))
    token = torch.arange(blocks * block, device=k.device).view(blocks, block)
    valid = (token < length[:, None, None])[..., None, None]
    if mode == "mean":
        wide = torch.promote_types(k.dtype, torch.float32)
        total = torch.where(valid, padded, 0).sum(2, dtype=wide)
        return ((total / valid.sum(2).clamp(min=1)).to(k.dtype),)
    maximum = torch.where(valid, padded, -torch.inf).amax(2)
    if mode == "max":
        return (maximum,)
    return (torch.stack((torch.where(valid, padded, torch.inf).amin(2), maximum), 3),)
