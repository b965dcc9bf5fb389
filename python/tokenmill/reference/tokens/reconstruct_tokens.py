"""reconstruct_tokens: out_n = sum_m w_nm values_m over the k nearest centroids, with w_nm = e^(-tau
|f_n - c_m|^2) divided by their sum, or by the root of the sum of their squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import MAX, finite, squared_distances


def reconstruct_tokens(
    features: Tensor, centroids: Tensor, values: Tensor, k: int, tau: float, norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(features.dtype, torch.float32)
    d = finite(squared_distances(features.detach().to(wide), centroids.detach().to(wide)))
    index = d.sort(dim=2, stable=True).indices[..., :k].sort(2).values
    d = d.gather(2, index)
    minimum = d.amin(2, keepdim=True)
    weight = torch.where(minimum < MAX, torch.exp(-tau * (d - minimum)), torch.nan)
    if norm == "l1":
        weight = weight / weight.sum(2, keepdim=True)
    else:
        weight = weight / weight.square().sum(2, keepdim=True).sqrt()

    batch, tokens, channels = *index.shape[:2], values.shape[2]
    at = index.reshape(batch, tokens * k, 1).expand(-1, -1, channels)
    rows = values.to(wide).gather(1, at).view(batch, tokens, k, channels)
    out = (weight[..., None] * rows).sum(2)
    return out.to(values.dtype), index.int(), weight
