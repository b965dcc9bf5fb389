"""kv_block_scores: scores of blocks of keys.

    z_ij = scale q_i . k_j;    minmax: scale sum_d max(q_d low_jd, q_d high_jd)
    softmax_vote: s_j = sum_h e^(z_hj - lse_h),    lse_h = log sum_j e^z_hj

A block has the maximum over its visible rows, and -inf where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..float8 import cache_rows
from ._common import lengths_of, rows_of
from .block_pool_keys import block_pool_keys


def kv_block_scores(
    q: Tensor,
    k: Tensor,
    scoring: str,
    block_k: int,
    q_reduce: str,
    block_q: int,
    head_reduce: str,
    scale: float,
    causal: bool,
    num_sink: int,
    num_recent: int,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor]:
    """dtype: dtype of the products, for plain PyTorch; None: at least float32."""
    queries, heads = q.shape[1:3]
    keys = rows_of(k, block_table)
    batch, rows, kv_heads = keys.shape[:3]
    row_tokens, block_rows = (1, block_k) if scoring == "max_block" else (block_k, 1)
    wide = dtype or torch.promote_types(q.dtype, torch.float32)

    last = torch.arange(queries, device=q.device)
    # the mean is rounded to the dtype of q, at the position of its last query
    if q_reduce == "mean":
        (q,) = block_pool_keys(q, block_q, "mean", None, None)
        last = (block_q * torch.arange(1, q.shape[1] + 1, device=q.device) - 1).clamp(
            max=queries - 1
        )
    x = q.to(wide).unflatten(2, (kv_heads, heads // kv_heads) if kv_heads else (0, 1))
    if k_scale is not None and k_scale.dim() == 3:
        k_scale = rows_of(k_scale, block_table)
    y = cache_rows(keys, k_scale, wide)
    if scoring == "minmax":
        low, high = y.unbind(3)
        z = _dots(x.clamp(max=0), low) + _dots(x.clamp(min=0), high)
        empty = (low[..., 0] > high[..., 0]).permute(0, 2, 1)[:, :, None, None]
        z = torch.where(empty, -torch.inf, z)
    else:
        z = _dots(x, y)
    z = (scale * z).flatten(1, 2)

    length = lengths_of(seqlens_k, batch, rows * row_tokens, q.device)
    end = (length - num_recent)[:, None] + (last - queries + 1 if causal else 0 * last)
    row = torch.arange(rows, device=q.device)
    until = torch.minimum((row + 1) * row_tokens, end[..., None])
    seen = (row * row_tokens).clamp(min=num_sink) < until
    seen = seen[:, None]
    z = torch.where(seen, z, -torch.inf)
    z, seen = (_blocks(t, 3, block_rows, f).amax(4) for t, f in ((z, -torch.inf), (seen, False)))
    if q_reduce == "max":
        z, seen = (_blocks(t, 2, block_q, f).amax(3) for t, f in ((z, -torch.inf), (seen, False)))
    if head_reduce == "softmax_vote":
        lse = torch.where(z.isnan(), -torch.inf, z).logsumexp(3, keepdim=True)
        return (torch.where(seen, (z - lse).exp().sum(1, keepdim=True), -torch.inf).to(_out(z)),)
    if head_reduce != "none":
        groups = z.unflatten(1, (kv_heads, heads // kv_heads) if kv_heads else (0, 1))
        if heads == 0:
            z = groups.new_full((batch, kv_heads, *groups.shape[3:]), -torch.inf)
        else:
            z = groups.amax(2) if head_reduce == "group_max" else groups.mean(2)
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
