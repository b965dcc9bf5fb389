"""Lists as masks: block c is listed if c = indices[e] > max(indices[:e]) for an e < counts."""

from __future__ import annotations

import torch
from torch import Tensor


def listed_blocks(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """[B, heads, rows, blocks]: the lists as a mask."""
    batch, heads, rows, entries = indices.shape
    if entries == 0 or blocks == 0:
        return indices.new_zeros((batch, heads, rows, blocks), dtype=torch.bool)
    largest = indices.cummax(-1).values
    before = torch.cat([torch.full_like(largest[..., :1], -1), largest[..., :-1]], -1)
    good = (indices > before.clamp(min=-1)) & (indices < blocks)
    good &= torch.arange(entries, device=indices.device) < counts[..., None]
    mask = indices.new_zeros((batch, heads, rows, blocks + 1), dtype=torch.bool)
    mask.scatter_(-1, torch.where(good, indices, blocks).long(), True)
    return mask[..., :blocks]
