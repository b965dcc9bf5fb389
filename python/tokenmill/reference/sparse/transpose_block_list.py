"""transpose_block_list: for each block c the rows r that list it, ascending:
listing[offsets[c] : offsets[c + 1]] = {r : c in list r}."""

from __future__ import annotations

from torch import Tensor

from ._common import listed_blocks


def transpose_block_list(indices: Tensor, counts: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    batch, heads, rows, entries = indices.shape
    mask = listed_blocks(indices, counts, num_blocks).transpose(2, 3)
    offsets = indices.new_zeros((batch, heads, num_blocks + 1))
    offsets[..., 1:] = mask.sum(-1).cumsum(-1)
    listing = indices.new_full((batch, heads, rows * entries), -1)
    for b in range(batch):
        for h in range(heads):
            found = mask[b, h].nonzero()[:, 1]
            listing[b, h, : len(found)] = found.int()
    return offsets, listing
