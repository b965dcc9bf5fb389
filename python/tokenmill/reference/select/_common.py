"""Keys from pages, and lengths of requests.

row j of request b is cache[block_table[b, j // size], j % size]
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def rows_of(k: Tensor, block_table: Tensor | None) -> Tensor:
    """Keys as [B, S, ...], gathered from their pages. Pages that do not exist are read as page
    0.
    """
    if block_table is None:
        return k
    if len(k) == 0:
        return k.new_zeros(len(block_table), block_table.shape[1] * k.shape[1], *k.shape[2:])
    there = (block_table >= 0) & (block_table < len(k))
    return k[torch.where(there, block_table, 0).long()].flatten(1, 2)


def lengths_of(lengths: Tensor | None, batch: int, maximum: int, device: torch.device) -> Tensor:
    if lengths is None:
        return torch.full((batch,), maximum, device=device)
    return lengths.long().clamp(0, maximum)


def broadcast_lengths(given: Tensor | None, longest: int, q: Tensor) -> Tensor:
    """Lengths as [B, 1, 1, 1]."""
    if given is None:
        return torch.full((q.shape[0], 1, 1, 1), longest, device=q.device)
    return given.long()[:, None, None, None]


def sequences_of(
    k: Tensor,
    seqlens_k: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
) -> list[tuple[int, int, Tensor]]:
    """For each packed sequence the first query, the end of the queries, and the keys."""
    ends: list[int] = cu_seqlens_q.tolist()
    if cu_seqlens_k is not None:
        ends_k: list[int] = cu_seqlens_k.tolist()
        keys = [k[a:b] for a, b in itertools.pairwise(ends_k)]
    else:
        rows = rows_of(k, block_table)
        length = lengths_of(seqlens_k, len(rows), rows.shape[1], k.device).tolist()
        keys = [x[:n] for x, n in zip(rows, length, strict=True)]
    return [(a, b, x) for (a, b), x in zip(itertools.pairwise(ends), keys, strict=True)]
