"""Attention to lists of key blocks, as a mask. See :mod:`tokenmill.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import expand_heads, scores, softmax, weighted_sum


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
    lengths: Tensor | None,
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    visible = visible_keys(
        q, k, indices, counts, block_q, block_k, causal, num_sink, num_recent, lengths
    )
    if lengths is not None:  # what lies behind them may be anything
        there = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
        k, v = (torch.where(there[..., None, None], x, 0.0) for x in (k, v))
    z = scores(q, k, scale, softcap, None, None, None, 0.0, upcast)
    p, lse = softmax(z, visible, None)
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
    lengths: Tensor | None,
) -> Tensor:
    """[B, H, Sq, Sk]: the first keys, the listed ones and the last ones, as far as there are any
    and the query may see them."""
    batch, sq, heads = q.shape[:3]
    sk = k.shape[1]
    at = torch.arange(sk, device=q.device)
    n = torch.full((batch,), sk, device=q.device) if lengths is None else lengths.clamp(0, sk)
    end = n[:, None].expand(batch, sq)
    if causal:
        end = end - sq + 1 + torch.arange(sq, device=q.device)
    end = end[:, None, :, None]  # of what a query may see
    blocks = listed_blocks(indices, counts, -(-sk // block_k))
    blocks = blocks.repeat_interleave(heads // max(blocks.shape[1], 1), 1)
    listed = blocks.repeat_interleave(block_q, 2)[:, :, :sq]
    listed = listed.repeat_interleave(block_k, 3)[..., :sk]
    return (listed | (at < num_sink) | (at >= end - num_recent)) & (at < end)


def listed_blocks(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """[B, heads, rows, blocks]: the lists as a mask."""
    batch, heads, rows, entries = indices.shape
    if entries == 0 or blocks == 0:
        return indices.new_zeros((batch, heads, rows, blocks), dtype=torch.bool)
    largest = indices.cummax(-1).values
    before = torch.cat([torch.full_like(largest[..., :1], -1), largest[..., :-1]], -1)
    good = (indices > before.clamp(min=-1)) & (indices < blocks)
    good &= torch.arange(entries, device=indices.device) < counts[..., None]
    mask = indices.new_zeros((batch, heads, rows, blocks + 1), dtype=torch.bool)
    mask.scatter_(-1, torch.where(good, indices, blocks).long(), True)
    return mask[..., :blocks]


def transpose_block_list(indices: Tensor, counts: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    batch, heads, rows, entries = indices.shape
    mask = listed_blocks(indices, counts, num_blocks).transpose(2, 3)
    offsets = indices.new_zeros((batch, heads, num_blocks + 1))
    offsets[..., 1:] = mask.sum(-1).cumsum(-1)
    listing = indices.new_full((batch, heads, rows * entries), -1)
    for b in range(batch):
        for h in range(heads):
            found = mask[b, h].nonzero()[:, 1]
            listing[b, h, : len(found)] = found.int()
    return offsets, listing
