"""cluster_tokens: iterations of soft assignment to the centroids in reach, and of means.

    q_nm = e^(-tau |x_n - c_m|^2) / sum_m' e^(-tau |x_n - c_m'|^2)
    c_m <- sum_n q_nm x_n / sum_n q_nm

A label is the nearest centroid. Only the last iteration has a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import finite, squared_distances

_MIN_WEIGHT = 2.0**-100  # relative to the largest weight of a row; smaller weights are 0


def cluster_tokens(
    x: Tensor, grid_y: int, grid_x: int, iters: int, tau: float, window: int, window_labels: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (batch, grid_y, grid_x)
    pixels = x.to(wide).flatten(1, 2)
    # pixels that are not finite have NaN weights, if any
    added = torch.where(pixels.isfinite(), pixels, 0.0)
    fixed = pixels.detach()
    reach = clusters_in_reach(height, width, grid_y, grid_x, window, x.device)

    image = fixed.view(x.shape).permute(0, 3, 1, 2)
    centroids = F.adaptive_avg_pool2d(image, (grid_y, grid_x)).flatten(2).mT
    for i in range(iters):
        previous = centroids
        q = _assignment(squared_distances(fixed, previous), reach, tau)
        mass = q.sum(1)
        total = q.mT @ (added if i == iters - 1 else added.detach())
        some = (mass > 0) | mass.isnan()
        mean = total / torch.where(some, mass, 1.0)[..., None]
        centroids = torch.where(some[..., None], mean, previous)

    d = finite(squared_distances(fixed, centroids.detach()))
    if window_labels:
        d = torch.where(reach, d, torch.inf)
    places = torch.arange(d.shape[2], device=d.device).expand_as(d)
    labels = torch.where(d == d.amin(2, keepdim=True), places, d.shape[2]).amin(2)
    return (
        centroids.to(x.dtype).reshape(*shape, channels),
        labels.int().view(batch, height, width),
        mass.view(shape),
        previous.reshape(*shape, channels),
    )


def clusters_in_reach(
    height: int, width: int, grid_y: int, grid_x: int, window: int, device: torch.device
) -> Tensor:
    """[N, M]: whether cluster m is a candidate of pixel n."""
    near = []
    for pixels, cells in ((height, grid_y), (width, grid_x)):
        home = torch.arange(pixels, device=device) * cells // pixels
        cell = torch.arange(cells, device=device)
        near.append((home[:, None] - cell).abs() <= window // 2)
    both = near[0][:, None, :, None] & near[1][None, :, None, :]
    return both.flatten(2, 3).flatten(0, 1)


def _assignment(d: Tensor, reach: Tensor, tau: float) -> Tensor:
    minimum = torch.where(reach, d, torch.inf).amin(2, keepdim=True)
    weight = torch.exp(-tau * (d - minimum))
    weight = torch.where(reach & ~(weight < _MIN_WEIGHT), weight, 0.0)
    return torch.where(reach, weight / weight.sum(2, keepdim=True), 0.0)
