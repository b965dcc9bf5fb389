"""attention_column_scores: attention received by a key from the counted queries.

    s_j = sum_i P_ij,    P_ij = e^(z_ij - lse_i),    z_ij = scale q_i . k_j
    with noise: z_ij = (scale q_i . k_j + g_ij) / tau

Without lse, P is the softmax of z. A mean divides by the number of counted rows, or of rows that
see j.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense._common import expand_heads, softmax
from ._common import broadcast_lengths
from .gumbel import gumbel_noise


def attention_column_scores(a: Any, *, upcast: bool = True) -> tuple[Tensor]:
    """Scores [B, H, Sk], or [B, Hk, Sk] with head_reduce. upcast=False keeps 16-bit inputs in 16
    bits: the baseline of the error budget.
    """
    batch, rows, heads = a.q.shape[:3]
    columns, kv_heads = a.k.shape[1:3]
    wide = torch.promote_types(a.q.dtype, torch.float32)
    q, k = (a.q.to(wide), a.k.to(wide)) if upcast else (a.q, a.k)
    n_rows = broadcast_lengths(a.seqlens_q, rows, q)
    n_columns = broadcast_lengths(a.seqlens_k, columns, q)
    first = n_rows * 0 if a.window_queries is None else (n_rows - a.window_queries).clamp(min=0)
    i = torch.arange(rows, device=q.device)[:, None]
    j = torch.arange(columns, device=q.device)
    counted = (i >= first) & (i < n_rows)
    diagonal = n_columns - n_rows
    visible = counted & (j < n_columns)
    if a.causal:
        visible = visible & (j <= i + diagonal)

    z = torch.einsum("bihd,bjhd->bhij", q, expand_heads(k, heads)) * a.scale
    if a.gumbel_tau > 0:
        noise = [
            gumbel_noise(
                a.seed, 1, heads, rows, columns, first_batch=b, first_row=int(d), dtype=wide
            )
            for b, d in enumerate(diagonal.flatten().tolist())
        ]
        z = (z + torch.cat(noise).to(z)) / a.gumbel_tau if noise else z
    if a.lse is None:
        p = torch.where(visible, softmax(z, visible, None)[0], 0)  # also masks the NaN of its row
    else:
        seen = visible & (a.lse > -torch.inf)[..., None]
        p = torch.where(seen, torch.exp(z - a.lse[..., None]), 0).to(z.dtype)
    scores = p.sum(2).to(wide)
    if a.reduce != "sum":
        count = (counted if a.reduce == "mean" else visible).sum(2)
        scores = scores / count.clamp(min=1)
    if a.head_reduce != "none":
        if heads == 0:
            return (scores.new_zeros(batch, kv_heads, columns),)
        grouped = scores.view(batch, kv_heads, heads // kv_heads, columns)
        scores = grouped.mean(2) if a.head_reduce == "group_mean" else grouped.amax(2)
    return (scores,)
