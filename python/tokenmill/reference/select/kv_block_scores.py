"""kv_block_scores: scores of blocks of keys.

    z_ij = scale q_i . k_j;    minmax: scale sum_d max(q_d low_jd, q_d high_jd)
    softmax_vote: s_j = sum_h e^(z_hj - lse_h),    lse_h = log sum_j e^z_hj

A block has the maximum over its visible rows, and -inf where there is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..float8 import cache_rows
from ._common import lengths_of, rows_of
from .block_pool_keys import pool


def kv_block_scores(a: Any, *, upcast: bool = True) -> tuple[Tensor]:
    """Scores [B, H, rows of queries, blocks], or fewer heads with head_reduce. upcast=False keeps
    16-bit inputs in 16 bits: the baseline of the error budget.
    """
    queries, heads = a.q.shape[1:3]
    keys = rows_of(a.k, a.block_table)
    batch, rows, kv_heads = keys.shape[:3]
    row_tokens, block_rows = (1, a.block_k) if a.scoring == "max_block" else (a.block_k, 1)
    wide = torch.promote_types(a.q.dtype, torch.float32) if upcast else a.q.dtype

    q, last = a.q, torch.arange(queries, device=a.q.device)
    # the mean is rounded to the dtype of q, at the position of its last query
    if a.q_reduce == "mean":
        q = pool(q, a.block_q, "mean", None)
        last = (a.block_q * torch.arange(1, q.shape[1] + 1, device=q.device) - 1).clamp(
            max=queries - 1
        )
    x = q.to(wide).unflatten(2, (kv_heads, heads // kv_heads) if kv_heads else (0, 1))
    scale = a.k_scale
    if scale is not None and scale.dim() == 3:
        scale = rows_of(scale, a.block_table)
    y = cache_rows(keys, scale, wide)
    if a.scoring == "minmax":
        low, high = y.unbind(3)
        z = _dots(x.clamp(max=0), low) + _dots(x.clamp(min=0), high)
        empty = (low[..., 0] > high[..., 0]).permute(0, 2, 1)[:, :, None, None]
        z = torch.where(empty, -torch.inf, z)
    else:
        z = _dots(x, y)
    z = (a.scale * z).flatten(1, 2)

    length = lengths_of(a.seqlens_k, batch, rows * row_tokens, q.device)
    end = (length - a.num_recent)[:, None] + (last - queries + 1 if a.causal else 0 * last)
    row = torch.arange(rows, device=q.device)
    until = torch.minimum((row + 1) * row_tokens, end[..., None])
    seen = (row * row_tokens).clamp(min=a.num_sink) < until
    seen = seen[:, None]
    z = torch.where(seen, z, -torch.inf)
    z, seen = (_blocks(t, 3, block_rows, f).amax(4) for t, f in ((z, -torch.inf), (seen, False)))
    if a.q_reduce == "max":
        z, seen = (_blocks(t, 2, a.block_q, f).amax(3) for t, f in ((z, -torch.inf), (seen, False)))
    if a.head_reduce == "softmax_vote":
        lse = torch.where(z.isnan(), -torch.inf, z).logsumexp(3, keepdim=True)
        return (torch.where(seen, (z - lse).exp().sum(1, keepdim=True), -torch.inf).to(_out(z)),)
    if a.head_reduce != "none":
        groups = z.unflatten(1, (kv_heads, heads // kv_heads) if kv_heads else (0, 1))
        if heads == 0:
            z = groups.new_full((batch, kv_heads, *groups.shape[3:]), -torch.inf)
        else:
            z = groups.amax(2) if a.head_reduce == "group_max" else groups.mean(2)
    return (z.to(_out(z)),)


def _out(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def _dots(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("brhgd,bnhd->bhgrn", q, k)


def _blocks(x: Tensor, dim: int, size: int, fill: float) -> Tensor:
    """Splits a dimension into blocks; the last one is padded."""
    size = min(size, max(x.shape[dim], 1))
    padding = [0, 0] * (x.dim() - dim - 1) + [0, -x.shape[dim] % size]
    return torch.nn.functional.pad(x, padding, value=fill).unflatten(dim, (-1, size))
