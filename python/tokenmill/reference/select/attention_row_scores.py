"""attention_row_scores: rows P_ij = e^(scale q_i . k_j - lse_i), or their sum, mean or maximum over
queries i and heads, or the position of each maximum. Without lse, P is the softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense._common import expand_heads, softmax
from ._common import broadcast_lengths


def attention_row_scores(a: Any, *, upcast: bool = True) -> tuple[Tensor]:
    """Scores [B, Sk - skip] of queries [B, R, H, D]; [B, H, R, Sk - skip] with reduce "none", [B,
    H, R] with "argmax". upcast=False keeps 16-bit inputs in 16 bits: the baseline of the error
    budget.
    """
    rows, heads = a.q.shape[1:3]
    columns = a.k.shape[1]
    wide = torch.promote_types(a.q.dtype, torch.float32)
    q, k = (a.q.to(wide), a.k.to(wide)) if upcast else (a.q, a.k)
    length = broadcast_lengths(a.seqlens_k, columns, q)
    j = torch.arange(columns, device=q.device)
    visible = j < length
    if a.causal:
        visible = visible & (j <= torch.arange(rows, device=q.device)[:, None] + length - rows)
    z = torch.einsum("bihd,bjhd->bhij", q, expand_heads(k, heads))
    if a.reduce == "argmax":
        sign = (a.scale > 0) - (a.scale < 0)  # keeps equal scores equal
        return (_largest(z * sign, visible & (j >= a.skip), a.lse),)
    z = z * a.scale
    if a.lse is None:
        p = softmax(z, visible, None)[0]
    else:
        p = torch.where((a.lse > -torch.inf)[..., None], torch.exp(z - a.lse[..., None]), 0)
    p = torch.where(visible, p.to(wide), 0)[..., a.skip :]
    if a.reduce == "none":
        return (p,)
    p = p.flatten(1, 2)
    if p.shape[1] == 0:
        return (p.sum(1),)
    return ({"sum": p.sum(1), "mean": p.mean(1), "max": p.amax(1)}[a.reduce],)


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
