"""cluster_tokens: iterations of soft assignment to the centroids in reach, and of means.

    q_nm = e^(-tau |x_n - c_m|^2) / sum_m' e^(-tau |x_n - c_m'|^2)
    c_m <- sum_n q_nm x_n / sum_n q_nm

A label is the nearest centroid. Only the last iteration has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX = torch.finfo(torch.float32).max
_MIN_WEIGHT = 2.0**-100  # relative to the largest weight of a row; smaller weights are 0


def cluster_tokens(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, Y, X, C]: centroids [B, Gy, Gx, C], labels [B, Y, X], mass [B, Gy, Gx], and the
    centroids before the last iteration.
    """
    batch, height, width, channels = a.x.shape
    wide = torch.promote_types(a.x.dtype, torch.float32)
    shape = (batch, a.grid_y, a.grid_x)
    pixels = a.x.to(wide).flatten(1, 2)
    # pixels that are not finite have NaN weights, if any
    added = torch.where(pixels.isfinite(), pixels, 0.0)
    fixed = pixels.detach()
    reach = clusters_in_reach(a)

    image = fixed.view(a.x.shape).permute(0, 3, 1, 2)
    centroids = F.adaptive_avg_pool2d(image, (a.grid_y, a.grid_x)).flatten(2).mT
    for i in range(a.iters):
        previous = centroids
        q = _assignment(squared_distances(fixed, previous), reach, a.tau)
        mass = q.sum(1)
        total = q.mT @ (added if i == a.iters - 1 else added.detach())
        some = (mass > 0) | mass.isnan()
        mean = total / torch.where(some, mass, 1.0)[..., None]
        centroids = torch.where(some[..., None], mean, previous)

    d = finite(squared_distances(fixed, centroids.detach()))
    if a.window_labels:
        d = torch.where(reach, d, torch.inf)
    places = torch.arange(d.shape[2], device=d.device).expand_as(d)
    labels = torch.where(d == d.amin(2, keepdim=True), places, d.shape[2]).amin(2)
    return (
        centroids.to(a.x.dtype).reshape(*shape, channels),
        labels.int().view(batch, height, width),
        mass.view(shape),
        previous.reshape(*shape, channels),
    )


def clusters_in_reach(a: Any) -> Tensor:
    """[N, M]: whether cluster m is a candidate of pixel n."""
    near = []
    for pixels, cells in ((a.x.shape[1], a.grid_y), (a.x.shape[2], a.grid_x)):
        home = torch.arange(pixels, device=a.x.device) * cells // pixels
        cell = torch.arange(cells, device=a.x.device)
        near.append((home[:, None] - cell).abs() <= a.window // 2)
    both = near[0][:, None, :, None] & near[1][None, :, None, :]
    return both.flatten(2, 3).flatten(0, 1)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[B, Na, Nb] as sums of squared differences, which avoids cancellation."""
    return torch.stack([(a - row[:, None]).square().sum(-1) for row in b.unbind(1)], 2)


def finite(d: Tensor) -> Tensor:
    return torch.where(d <= MAX, d, MAX)


def _assignment(d: Tensor, reach: Tensor, tau: float) -> Tensor:
    minimum = torch.where(reach, d, torch.inf).amin(2, keepdim=True)
    weight = torch.exp(-tau * (d - minimum))
    weight = torch.where(reach & ~(weight < _MIN_WEIGHT), weight, 0.0)
    return torch.where(reach, weight / weight.sum(2, keepdim=True), 0.0)
