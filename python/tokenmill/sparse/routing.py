"""Region-to-region routing: the first level of bi-level routing attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..select.topk_select import topk_select
from .query_lists import ordered_sum


def region_means(x: Tensor, region_y: int, region_x: int) -> Tensor:
    """float32 [B, R, H, D] (float64 for float64): means of x [B, Y, X, H, D] over the pixels of
    each region.
    """
    # Rows first: a sum along Y reads memory in order, and is many times as fast as one over both
    # axes at once.
    return _means(_means(x, 1, region_y), 2, region_x).flatten(1, 2)


def _means(x: Tensor, axis: int, size: int) -> Tensor:
    """Means of `size` neighbours along an axis, and of the remainder at its end."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    side = x.shape[axis]
    whole = side // size * size
    parts = []
    if whole > 0:
        part = x.narrow(axis, 0, whole).to(dtype).unflatten(axis, (-1, size))
        parts.append(ordered_sum(part, axis + 1) / size)
    if whole < side:
        rest = x.narrow(axis, whole, side - whole).to(dtype)
        parts.append((ordered_sum(rest, axis) / (side - whole)).unsqueeze(axis))
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


@torch.no_grad()
def route(
    q: Tensor,
    k: Tensor,
    topk: int,
    region: tuple[int, int],
    key_region: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Lists [B, 1, R, topk] and counts [B, 1, R] of the regions of k whose mean has the largest
    product with the mean of a region of q, over all heads; ties go to the lower region.
    """
    mean_q, mean_k = region_means(q, *region), region_means(k, *key_region)
    group = q.shape[3] // max(k.shape[3], 1)
    if group > 1:
        mean_q = ordered_sum(mean_q.unflatten(2, (-1, group)), 3)
    scores = mean_q.flatten(2) @ mean_k.flatten(2).transpose(1, 2)  # [B, R, R]
    regions = scores.shape[1]
    indices, counts = topk_select(scores.flatten(0, 1), topk)[:2]
    shape = (q.shape[0], 1, regions)
    return indices.view(*shape, topk), counts.view(shape)
