"""Oracles of cluster_tokens and reconstruct_tokens, in plain PyTorch. They take the arguments of
their schemas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST = torch.finfo(torch.float32).max
_LEAST_WEIGHT = 2.0**-100  # in units of the greatest of a row; a smaller one is 0


def cluster_tokens(
    x: Tensor, grid_y: int, grid_x: int, iters: int, tau: float, window: int, window_labels: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (batch, grid_y, grid_x)
    pixels = x.to(wide).flatten(1, 2)
    added = torch.where(pixels.isfinite(), pixels, 0.0)  # others have weights NaN, if any
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

    d = _finite(squared_distances(fixed, centroids.detach()))
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
    """[N, M]: which clusters a pixel weighs."""
    near = []
    for pixels, cells in ((height, grid_y), (width, grid_x)):
        home = torch.arange(pixels, device=device) * cells // pixels
        cell = torch.arange(cells, device=device)
        near.append((home[:, None] - cell).abs() <= window // 2)
    both = near[0][:, None, :, None] & near[1][None, :, None, :]
    return both.flatten(2, 3).flatten(0, 1)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[B, Na, Nb] as sums of squared differences: nothing cancels."""
    return torch.stack([(a - row[:, None]).square().sum(-1) for row in b.unbind(1)], 2)


def _assignment(d: Tensor, reach: Tensor, tau: float) -> Tensor:
    least = torch.where(reach, d, torch.inf).amin(2, keepdim=True)
    weight = torch.exp(-tau * (d - least))
    weight = torch.where(reach & ~(weight < _LEAST_WEIGHT), weight, 0.0)
    return torch.where(reach, weight / weight.sum(2, keepdim=True), 0.0)


def _finite(d: Tensor) -> Tensor:
    return torch.where(d <= _MOST, d, _MOST)


def reconstruct_tokens(
    features: Tensor, centroids: Tensor, values: Tensor, k: int, tau: float, norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(features.dtype, torch.float32)
    d = _finite(squared_distances(features.detach().to(wide), centroids.detach().to(wide)))
    index = d.sort(dim=2, stable=True).indices[..., :k].sort(2).values
    d = d.gather(2, index)
    least = d.amin(2, keepdim=True)
    weight = torch.where(least < _MOST, torch.exp(-tau * (d - least)), torch.nan)
    if norm == "l1":
        weight = weight / weight.sum(2, keepdim=True)
    else:
        weight = weight / weight.square().sum(2, keepdim=True).sqrt()

    batch, tokens, channels = *index.shape[:2], values.shape[2]
    at = index.reshape(batch, tokens * k, 1).expand(-1, -1, channels)
    rows = values.to(wide).gather(1, at).view(batch, tokens, k, channels)
    out = (weight[..., None] * rows).sum(2)
    return out.to(values.dtype), index.int(), weight
