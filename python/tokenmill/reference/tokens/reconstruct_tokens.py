"""reconstruct_tokens: out_n = sum_m w_nm values_m over the k nearest centroids, with w_nm = e^(-tau
|f_n - c_m|^2) divided by their sum, or by the root of the sum of their squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cluster_tokens import MAX, finite, squared_distances


def reconstruct_tokens(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """features [B, N, C], centroids [B, M, C], values [B, M, Cv]: out [B, N, Cv], index and weight
    [B, N, k].
    """
    wide = torch.promote_types(a.features.dtype, torch.float32)
    d = finite(squared_distances(a.features.detach().to(wide), a.centroids.detach().to(wide)))
    index = d.sort(dim=2, stable=True).indices[..., : a.k].sort(2).values
    d = d.gather(2, index)
    minimum = d.amin(2, keepdim=True)
    weight = torch.where(minimum < MAX, torch.exp(-a.tau * (d - minimum)), torch.nan)
    if a.norm == "l1":
        weight = weight / weight.sum(2, keepdim=True)
    else:
        weight = weight / weight.square().sum(2, keepdim=True).sqrt()

    batch, tokens, channels = *index.shape[:2], a.values.shape[2]
    at = index.reshape(batch, tokens * a.k, 1).expand(-1, -1, channels)
    rows = a.values.to(wide).gather(1, at).view(batch, tokens, a.k, channels)
    out = (weight[..., None] * rows).sum(2)
    return out.to(a.values.dtype), index.int(), weight
