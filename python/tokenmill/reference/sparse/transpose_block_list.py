"""transpose_block_list: for each block c the rows r that list it, ascending:
listing[offsets[c] : offsets[c + 1]] = {r : c in list r}. Block c is listed if c = indices[e] >
max(indices[:e]) for an e < counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def transpose_block_list(a: Any) -> tuple[Tensor, Tensor]:
    """Offsets [B, heads, num_blocks + 1] and the listing [B, heads, rows * K] of lists [B, heads,
    rows, K].
    """
    batch, heads, rows, entries = a.indices.shape
    mask = listed_blocks(a.indices, a.counts, a.num_blocks).transpose(2, 3)
    offsets = a.indices.new_zeros((batch, heads, a.num_blocks + 1))
    offsets[..., 1:] = mask.sum(-1).cumsum(-1)
    listing = a.indices.new_full((batch, heads, rows * entries), -1)
    for b in range(batch):
        for h in range(heads):
            found = mask[b, h].nonzero()[:, 1]
            listing[b, h, : len(found)] = found.int()
    return offsets, listing


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
