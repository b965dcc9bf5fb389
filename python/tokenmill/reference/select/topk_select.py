"""topk_select: the positions of the k largest of (class, score), where a forced position has class
2, another position with a score > -inf class 1, and others are not selected. Ties go to the lower
position, or to the higher one."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_select(
    scores: Tensor,
    k: int,
    lengths: Tensor | None,
    row_starts: Tensor | None,
    tie: str,
    order: str,
    force_first: int,
    force_last: int,
    block_table: Tensor | None,
    page_size: int,
    row_to_batch: Tensor | None,
    return_values: bool,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = scores.shape
    start = scores.new_zeros(rows, dtype=torch.int64) if row_starts is None else row_starts.long()
    length = (columns - start) if lengths is None else lengths.long()
    length = torch.minimum(length.clamp(min=0), columns - start)[:, None]
    position = torch.arange(columns, device=scores.device).expand(rows, columns)
    column = (start[:, None] + position).clamp(max=max(columns - 1, 0))
    x = scores.gather(1, column)

    inside = position < length
    forced = inside & ((position < force_first) | (position >= length - force_last))
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
    valid = torch.arange(k, device=scores.device) < counts[:, None]
    indices = torch.where(valid, ordered, -1)

    empty = scores.new_empty(0)
    values = empty
    if return_values:
        found = x.gather(1, ordered) if columns else scores.new_zeros(rows, k)
        values = torch.where(valid, found, -torch.inf)
    physical = empty.int()
    if block_table is not None:
        physical = _physical(indices, block_table, page_size, row_to_batch)
    return indices.int(), counts.int(), values, physical


def _descending(x: Tensor) -> Tensor:
    return x.argsort(dim=1, descending=True, stable=True)


def _physical(
    indices: Tensor, block_table: Tensor, page_size: int, row_to_batch: Tensor | None
) -> Tensor:
    """block_table[b, i // page_size] * page_size + i % page_size, -1 where there is no page."""
    rows = torch.arange(len(indices), device=indices.device)
    batch = (rows if row_to_batch is None else row_to_batch.long())[:, None]
    page = indices.clamp(min=0) // page_size
    there = (indices >= 0) & (page < block_table.shape[1])
    if block_table.numel() == 0:
        return torch.full_like(indices, -1, dtype=torch.int32)
    found = block_table[batch, page.clamp(max=block_table.shape[1] - 1)].long()
    slot = found * page_size + indices % page_size
    return torch.where(there & (found >= 0) & (slot < 2**31), slot, -1).int()
