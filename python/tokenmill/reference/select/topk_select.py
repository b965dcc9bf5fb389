"""topk_select: the positions of the k largest of (class, score), where a forced position has class
2, another position with a score > -inf class 1, and others are not selected. Ties go to the lower
position, or to the higher one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def topk_select(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices [R, k] of scores [R, n], counts [R], values [R, k] and physical slots [R, k]."""
    rows, columns = a.scores.shape
    start = a.scores.new_zeros(rows, dtype=torch.int64)
    start = start if a.row_starts is None else a.row_starts.long()
    length = (columns - start) if a.lengths is None else a.lengths.long()
    length = torch.minimum(length.clamp(min=0), columns - start)[:, None]
    position = torch.arange(columns, device=a.scores.device).expand(rows, columns)
    column = (start[:, None] + position).clamp(max=max(columns - 1, 0))
    x = a.scores.gather(1, column)

    inside = position < length
    forced = inside & ((position < a.force_first) | (position >= length - a.force_last))
    indices, counts, values = select(x, inside, forced, a.k, a.tie, a.order)
    physical = a.scores.new_empty(0, dtype=torch.int32)
    if a.block_table is not None:
        physical = _physical(indices, a)
    return indices.int(), counts, values if a.return_values else a.scores.new_empty(0), physical


def select(
    x: Tensor, inside: Tensor, forced: Tensor, k: int, tie: str = "low", order: str = "index"
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [R, k], counts [R] and values [R, k] of the scores x [R, n] that are inside."""
    rows, columns = x.shape
    position = torch.arange(columns, device=x.device).expand(rows, columns)
    selectable = inside & (x > -torch.inf)
    # Two stable sorts: by score, then by class. The first keeps ties in the given order.
    by_position = position.flip(1) if tie == "high" else position
    finite = torch.where(x > -torch.inf, x, -torch.inf)
    by_score = by_position.gather(1, _descending(finite.gather(1, by_position)))
    rank = 2 * forced.int() + selectable.int()
    rank = rank.clamp(max=2)
    ranked = by_score.gather(1, _descending(rank.gather(1, by_score)))

    taken = ranked[:, :k]
    counts = (rank > 0).sum(1).clamp(max=k)
    chosen = torch.zeros_like(inside).scatter(1, taken, True) & (rank > 0)
    if order == "index":
        ordered = position.gather(1, _descending(chosen.int()))
    else:
        ordered = by_score.gather(1, _descending(chosen.gather(1, by_score).int()))
    ordered = torch.nn.functional.pad(ordered[:, :k], (0, max(k - columns, 0)))
    valid = torch.arange(k, device=x.device) < counts[:, None]
    found = x.gather(1, ordered) if columns else x.new_zeros(rows, k)
    values = torch.where(valid, found, -torch.inf)
    return torch.where(valid, ordered, -1), counts.int(), values


def _descending(x: Tensor) -> Tensor:
    return x.argsort(dim=1, descending=True, stable=True)


def _physical(indices: Tensor, a: Any) -> Tensor:
    """block_table[b, i // page_size] * page_size + i % page_size, -1 where there is no page."""
    rows = torch.arange(len(indices), device=indices.device)
    batch = (rows if a.row_to_batch is None else a.row_to_batch.long())[:, None]
    page = indices.clamp(min=0) // a.page_size
    there = (indices >= 0) & (page < a.block_table.shape[1])
    if a.block_table.numel() == 0:
        return torch.full_like(indices, -1, dtype=torch.int32)
    found = a.block_table[batch, page.clamp(max=a.block_table.shape[1] - 1)].long()
    slot = found * a.page_size + indices % a.page_size
    return torch.where(there & (found >= 0) & (slot < 2**31), slot, -1).int()
