"""block_sparse_attention: out_i = sum_j softmax(z_i)_j v_j over the visible keys.

    z_ij = softcap tanh(scale q_i . k_j / softcap)

A sink of the head is one more logit, without a value. mass_e is the weight of the keys added by
entry e. Key j is visible if j < end_i, and j < num_sink, j >= end_i - num_recent, or the list of
the query's block has j // block_k. end_i is the length, with causal i + 1 + length - Sq. Packed
requests are separate calls: the lists of request b begin at row first_query // block_q + b.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..dense._common import expand_heads, scores, softmax, weighted_sum
from ..select._common import rows_of, sequences_of
from ._common import listed_blocks, listed_entries


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
    return_mass: bool,
    block_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens_q is not None:
        keys, values = (
            sequences_of(x, seqlens_k, cu_seqlens_q, cu_seqlens_k, block_table) for x in (k, v)
        )

        def alone(b: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            first, end, own_k = keys[b]
            return block_sparse_attention(
                q[None, first:end], own_k[None], values[b][2][None], indices[None, :, rows],
                counts[None, :, rows], block_q, block_k, causal, num_sink, num_recent, scale,
                softcap, None, sink, return_mass, None, None, None, upcast=upcast,
            )  # fmt: skip

        places = [(first, end) for first, end, _ in keys]
        return _packed(q, v, indices if return_mass else None, places, block_q, alone)
    k, v = (rows_of(x, block_table) for x in (k, v))
    visible, added = visible_and_added(
        q, k, indices, counts, block_q, block_k, causal, num_sink, num_recent, seqlens_k
    )
    if seqlens_k is not None:  # rows past the lengths may hold anything
        there = torch.arange(k.shape[1], device=k.device) < seqlens_k[:, None]
        k, v = (torch.where(there[..., None, None], x, 0.0) for x in (k, v))
    z = scores(q, k, scale, softcap, None, None, None, 0.0, upcast)
    p, lse = softmax(z, visible, sink)
    out = weighted_sum(p, expand_heads(v, q.shape[2]).to(p.dtype)).to(q.dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    mass = q.new_zeros(0)
    if return_mass:
        weights = torch.where(added, p.detach(), 0.0)
        mass = _mass(weights, indices, counts, block_q, block_k)
    return out, lse.to(wide), mass.to(wide)


def _packed(
    q: Tensor,
    v: Tensor,
    indices: Tensor | None,
    places: list[tuple[int, int]],
    block_q: int,
    alone: Callable[[int, slice], tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """The separate results of requests with queries `first` to `end` - 1, each with its rows of the
    lists; mass where there are indices.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    outs = [q[:0, :, :1].expand(-1, -1, v.shape[-1])]
    lses = [q[:0, :, 0].T.to(wide)]
    masses = q.new_zeros(0 if indices is None else indices.shape, dtype=wide)
    for b, (first, end) in enumerate(places):
        row = first // block_q + b
        rows = slice(row, row + -(-(end - first) // block_q))
        out, lse, mass = alone(b, rows)
        outs.append(out[0])
        lses.append(lse[0])
        if indices is not None:
            masses[:, rows] = mass[0]
    return torch.cat(outs), torch.cat(lses, 1), masses


def visible_and_added(
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
) -> tuple[Tensor, Tensor]:
    """[B, H, Sq, Sk]: the visible keys, and the keys that lists add to the sink and recent ones."""
    at = torch.arange(k.shape[1], device=q.device)
    end = _ends(q, k, causal, seqlens_k)
    listed = _listed(q, k, indices, counts, block_q, block_k) & (at < end)
    kept = (at < num_sink) | (at >= end - num_recent)
    return listed | (kept & (at < end)), listed & ~kept


def _ends(q: Tensor, k: Tensor, causal: bool, seqlens_k: Tensor | None) -> Tensor:
    """[B, 1, Sq, 1]: end of the keys that a query may see."""
    batch, sq, sk = q.shape[0], q.shape[1], k.shape[1]
    n = torch.full((batch,), sk, device=q.device) if seqlens_k is None else seqlens_k.clamp(0, sk)
    end = n[:, None].expand(batch, sq)
    if causal:
        end = end - sq + 1 + torch.arange(sq, device=q.device)
    return end[:, None, :, None]


def _listed(
    q: Tensor, k: Tensor, indices: Tensor, counts: Tensor, block_q: int, block_k: int
) -> Tensor:
    """[B, H, Sq, Sk]: the listed keys."""
    sq, heads, sk = q.shape[1], q.shape[2], k.shape[1]
    blocks = listed_blocks(indices, counts, -(-sk // block_k))
    blocks = blocks.repeat_interleave(heads // max(blocks.shape[1], 1), 1)
    listed = blocks.repeat_interleave(block_q, 2)[:, :, :sq]
    return listed.repeat_interleave(block_k, 3)[..., :sk]


def _mass(weights: Tensor, indices: Tensor, counts: Tensor, block_q: int, block_k: int) -> Tensor:
    """Sums of weights [B, H, Sq, Sk] over the rows of each list and the keys of its entries."""
    batch, heads, sq, sk = weights.shape
    lists, rows = indices.shape[1:3]
    blocks = -(-sk // block_k)
    padding = (0, blocks * block_k - sk, 0, rows * block_q - sq)
    tiles = torch.nn.functional.pad(weights, padding)
    sizes = (batch, lists, heads // max(lists, 1), rows, block_q, blocks, block_k)
    tiles = tiles.reshape(sizes).sum((2, 4, 6))  # [B, lists, rows, blocks]
    counted = listed_entries(indices, counts, blocks)
    ids = torch.where(counted, indices, 0).long()
    if blocks == 0:
        return tiles.new_zeros(indices.shape)
    return torch.where(counted, tiles.gather(3, ids), 0.0)
