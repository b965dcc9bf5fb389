"""block_sparse_attention: out_i = sum_j softmax(z_i)_j v_j over the visible keys.

    z_ij = softcap tanh(scale q_i . k_j / softcap)

A sink of the head is one more logit, without a value.
Key j is visible if j < end_i, and j < num_sink, j >= end_i - num_recent, or the list of the query's
block has j // block_k. end_i is the length, with causal i + 1 + length - Sq.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dense._common import expand_heads, scores, softmax, weighted_sum
from ._common import listed_blocks


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    num_sink: int,
    num_recent: int,
    scale: float,
    softcap: float,
    seqlens_k: Tensor | None,
    sink: Tensor | None,
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    visible = visible_keys(
        q, k, indices, counts, block_q, block_k, causal, num_sink, num_recent, seqlens_k
    )
    if seqlens_k is not None:  # what lies behind them may be anything
        there = torch.arange(k.shape[1], device=k.device) < seqlens_k[:, None]
        k, v = (torch.where(there[..., None, None], x, 0.0) for x in (k, v))
    z = scores(q, k, scale, softcap, None, None, None, 0.0, upcast)
    p, lse = softmax(z, visible, sink)
    out = weighted_sum(p, expand_heads(v, q.shape[2]).to(p.dtype)).to(q.dtype)
    return out, lse.to(torch.promote_types(q.dtype, torch.float32))


def visible_keys(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    num_sink: int,
    num_recent: int,
    seqlens_k: Tensor | None,
) -> Tensor:
    """[B, H, Sq, Sk]: the first keys, the listed ones and the last ones, as far as there are any
    and the query may see them."""
    batch, sq, heads = q.shape[:3]
    sk = k.shape[1]
    at = torch.arange(sk, device=q.device)
    n = torch.full((batch,), sk, device=q.device) if seqlens_k is None else seqlens_k.clamp(0, sk)
    end = n[:, None].expand(batch, sq)
    if causal:
        end = end - sq + 1 + torch.arange(sq, device=q.device)
    end = end[:, None, :, None]  # of what a query may see
    blocks = listed_blocks(indices, counts, -(-sk // block_k))
    blocks = blocks.repeat_interleave(heads // max(blocks.shape[1], 1), 1)
    listed = blocks.repeat_interleave(block_q, 2)[:, :, :sq]
    listed = listed.repeat_interleave(block_k, 3)[..., :sk]
    return (listed | (at < num_sink) | (at >= end - num_recent)) & (at < end)
