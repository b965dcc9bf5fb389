"""transpose_block_list: for each block c the rows r that list it, ascending:
listing[offsets[c] : offsets[c + 1]] = {r : c in list r}."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._common import listed_blocks


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
