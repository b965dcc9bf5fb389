"""Which regions of a map attend to which: the first level of bi-level routing attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..select.topk_select import topk_select


def region_means(x: Tensor, region_y: int, region_x: int) -> Tensor:
    """[B, R, H, D] float32 (float64 of float64): means of x [B, Y, X, H, D] over the pixels of each
    region."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    height, width = x.shape[1:3]
    rows = []
    for at_y, size_y in _parts(height, region_y):
        row = []
        for at_x, size_x in _parts(width, region_x):
            part = x[:, at_y[0] : at_y[1], at_x[0] : at_x[1]]
            part = part.unflatten(2, (-1, size_x)).unflatten(1, (-1, size_y))
            row.append(part.mean((2, 4), dtype=dtype))
        rows.append(torch.cat(row, 2))
    return torch.cat(rows, 1).flatten(1, 2)


def _parts(side: int, region: int) -> list[tuple[tuple[int, int], int]]:
    """The pixels of whole regions along a side, and those of the last, smaller one."""
    whole = side // region * region
    return [
        ((at, end), size)
        for at, end, size in ((0, whole, region), (whole, side, side - whole))
        if at < end
    ]


@torch.no_grad()
def route(
    q: Tensor,
    k: Tensor,
    topk: int,
    region: tuple[int, int],
    key_region: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Lists [B, 1, R, topk] and counts [B, 1, R] of the regions of k whose mean has the largest
    product with that of a region of q, over all heads; of equal ones the lower."""
    mean_q, mean_k = region_means(q, *region), region_means(k, *key_region)
    group = q.shape[3] // max(k.shape[3], 1)
    if group > 1:
        mean_q = mean_q.unflatten(2, (-1, group)).sum(3)
    scores = mean_q.flatten(2) @ mean_k.flatten(2).transpose(1, 2)  # [B, R, R]
    regions = scores.shape[1]
    indices, counts = topk_select(scores.flatten(0, 1), topk)[:2]
    shape = (q.shape[0], 1, regions)
    return indices.view(*shape, topk), counts.view(shape)
