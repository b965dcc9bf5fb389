"""block_sparse_attention: out_i = sum_j softmax(z_i)_j v_j over the visible keys.

    z_ij = softcap tanh(scale q_i . k_j / softcap)

A sink of the head is one more logit, without a value. mass_e is the weight of the keys added by
entry e. Key j is visible if j < end_i, and j < num_sink, j >= end_i - num_recent, or the list of
the query's block has j // block_k. end_i is the length, with causal i + 1 + length - Sq. Packed
requests are separate calls: the lists of request b begin at row first_query // block_q + b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense._common import expand_heads, scores, softmax, weighted_sum
from ..select._common import rows_of, sequences_of
from .transpose_block_list import listed_blocks, listed_entries


def block_sparse_attention(a: Any, *, upcast: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Sq, H, Dv], lse [B, H, Sq] and mass in the shape of the lists, of q [B, Sq, H, D]
    over k and v [B, Sk, Hk, ...] or pages, with lists [B, 1 | Hk | H, R, K]; packed queries have
    out [T, H, Dv] and lse [H, T].
    """
    if a.cu_seqlens_q is not None:
        return _packed(a, upcast)
    k, v = (rows_of(x, a.block_table) for x in (a.k, a.v))
    a = a._replace(k=k, v=v, block_table=None)
    visible, added = visible_and_added(a)
    if a.seqlens_k is not None:  # rows past the lengths may hold anything
        there = torch.arange(k.shape[1], device=k.device) < a.seqlens_k[:, None]
        k, v = (torch.where(there[..., None, None], x, 0.0) for x in (k, v))
    z = scores(a.q, k, a.scale, a.softcap, None, None, None, 0.0, upcast)
    p, lse = softmax(z, visible, a.sink)
    out = weighted_sum(p, expand_heads(v, a.q.shape[2]).to(p.dtype)).to(a.q.dtype)
    wide = torch.promote_types(a.q.dtype, torch.float32)
    mass = a.q.new_zeros(0)
    if a.return_mass:
        mass = _mass(a, torch.where(added, p.detach(), 0.0))
    return out, lse.to(wide), mass.to(wide)


def _packed(a: Any, upcast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The separate results of requests, each with its rows of the lists."""
    keys, values = (
        sequences_of(x, a.seqlens_k, a.cu_seqlens_q, a.cu_seqlens_k, a.block_table)
        for x in (a.k, a.v)
    )
    wide = torch.promote_types(a.q.dtype, torch.float32)
    outs = [a.q[:0, :, :1].expand(-1, -1, a.v.shape[-1])]
    lses = [a.q[:0, :, 0].T.to(wide)]
    masses = a.q.new_zeros(a.indices.shape if a.return_mass else 0, dtype=wide)
    whole = dict.fromkeys(("seqlens_k", "block_table", "cu_seqlens_q", "cu_seqlens_k"))
    for b, ((first, end, own_k), (_, _, own_v)) in enumerate(zip(keys, values, strict=True)):
        row = first // a.block_q + b
        rows = slice(row, row + -(-(end - first) // a.block_q))
        lists = {"indices": a.indices[None, :, rows], "counts": a.counts[None, :, rows]}
        request = a._replace(q=a.q[None, first:end], k=own_k[None], v=own_v[None], **lists, **whole)
        out, lse, mass = block_sparse_attention(request, upcast=upcast)
        outs.append(out[0])
        lses.append(lse[0])
        if a.return_mass:
            masses[:, rows] = mass[0]
    return torch.cat(outs), torch.cat(lses, 1), masses


def visible_and_added(a: Any) -> tuple[Tensor, Tensor]:
    """[B, H, Sq, Sk]: the visible keys, and the keys that lists add to the sink and recent ones, of
    keys without pages.
    """
    at = torch.arange(a.k.shape[1], device=a.q.device)
    end = _ends(a)
    listed = _listed(a) & (at < end)
    kept = (at < a.num_sink) | (at >= end - a.num_recent)
    return listed | (kept & (at < end)), listed & ~kept


def _ends(a: Any) -> Tensor:
    """[B, 1, Sq, 1]: end of the keys that a query may see."""
    (batch, sq), sk = a.q.shape[:2], a.k.shape[1]
    n = torch.full((batch,), sk, device=a.q.device)
    if a.seqlens_k is not None:
        n = a.seqlens_k.clamp(0, sk)
    end = n[:, None].expand(batch, sq)
    if a.causal:
        end = end - sq + 1 + torch.arange(sq, device=a.q.device)
    return end[:, None, :, None]


def _listed(a: Any) -> Tensor:
    """[B, H, Sq, Sk]: the listed keys."""
    sq, heads, sk = a.q.shape[1], a.q.shape[2], a.k.shape[1]
    blocks = listed_blocks(a.indices, a.counts, -(-sk // a.block_k))
    blocks = blocks.repeat_interleave(heads // max(blocks.shape[1], 1), 1)
    listed = blocks.repeat_interleave(a.block_q, 2)[:, :, :sq]
    return listed.repeat_interleave(a.block_k, 3)[..., :sk]


def _mass(a: Any, weights: Tensor) -> Tensor:
    """Sums of weights [B, H, Sq, Sk] over the rows of each list and the keys of its entries."""
    batch, heads, sq, sk = weights.shape
    lists, rows = a.indices.shape[1:3]
    blocks = -(-sk // a.block_k)
    padding = (0, blocks * a.block_k - sk, 0, rows * a.block_q - sq)
    tiles = torch.nn.functional.pad(weights, padding)
    sizes = (batch, lists, heads // max(lists, 1), rows, a.block_q, blocks, a.block_k)
    tiles = tiles.reshape(sizes).sum((2, 4, 6))  # [B, lists, rows, blocks]
    counted = listed_entries(a.indices, a.counts, blocks)
    ids = torch.where(counted, a.indices, 0).long()
    if blocks == 0:
        return tiles.new_zeros(a.indices.shape)
    return torch.where(counted, tiles.gather(3, ids), 0.0)
