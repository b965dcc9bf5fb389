"""Lists as masks: block c is listed if c = indices[e] > max(indices[:e]) for an e < counts."""

from __future__ import annotations

import torch
from torch import Tensor


def listed_blocks(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """[B, heads, rows, blocks]: the lists as a mask."""
    mask = indices.new_zeros((*indices.shape[:3], blocks + 1), dtype=torch.bool)
    listed = listed_entries(indices, counts, blocks)
    mask.scatter_(-1, torch.where(listed, indices, blocks).long(), True)
    return mask[..., :blocks]


def listed_entries(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """[B, heads, rows, K]: valid entries of the lists."""
    entries = indices.shape[-1]
    if entries == 0:  # cummax fails on an empty dimension
        return torch.zeros_like(indices, dtype=torch.bool)
    largest = indices.cummax(-1).values
    before = torch.cat([torch.full_like(largest[..., :1], -1), largest[..., :-1]], -1)
    good = (indices > before.clamp(min=-1)) & (indices < blocks)
    return good & (torch.arange(entries, device=indices.device) < counts[..., None])
