"""attention_row_scores: rows P_ij = e^(scale q_i . k_j - lse_i), or their sum, mean or maximum over
queries i and heads, or the position of each maximum. Without lse, P is the softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dense._common import expand_heads, softmax
from ._common import broadcast_lengths


def attention_row_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    reduce: str,
    skip: int,
    seqlens_k: Tensor | None,
    *,
    upcast: bool = True,
) -> tuple[Tensor]:
    """upcast=False keeps 16-bit inputs in 16 bits: the baseline of the error budget."""
    rows, heads = q.shape[1:3]
    columns = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    if upcast:
        q, k = q.to(wide), k.to(wide)
    length = broadcast_lengths(seqlens_k, columns, q)
    j = torch.arange(columns, device=q.device)
    visible = j < length
    if causal:
        visible = visible & (j <= torch.arange(rows, device=q.device)[:, None] + length - rows)
    z = torch.einsum("bihd,bjhd->bhij", q, expand_heads(k, heads))
    if reduce == "argmax":
        sign = (scale > 0) - (scale < 0)  # keeps equal scores equal
        return (_largest(z * sign, visible & (j >= skip), lse),)
    z = z * scale
    if lse is None:
        p = softmax(z, visible, None)[0]
    else:
        p = torch.where((lse > -torch.inf)[..., None], torch.exp(z - lse[..., None]), 0)
    p = torch.where(visible, p.to(wide), 0)[..., skip:]
    if reduce == "none":
        return (p,)
    p = p.flatten(1, 2)
    if p.shape[1] == 0:
        return (p.sum(1),)
    return ({"sum": p.sum(1), "mean": p.mean(1), "max": p.amax(1)}[reduce],)


def _largest(z: Tensor, visible: Tensor, lse: Tensor | None) -> Tensor:
    """int32 [B, H, R]: position of the first of the largest visible scores; -1 where there is
    none.
    """
    if lse is not None:
        visible = visible & (lse > -torch.inf)[..., None]
    visible = visible.expand_as(z)
    if z.shape[-1] == 0:
        return z.new_full(z.shape[:-1], -1, dtype=torch.int32)
    z = torch.where(z.isnan(), torch.inf, z)
    top = torch.where(visible, z, -torch.inf).amax(-1, keepdim=True)
    best = (visible & (z == top)).int().argmax(-1)
    return torch.where(visible.any(-1), best, -1).int()
