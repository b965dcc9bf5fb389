"""Oracles of the family `select`, in plain PyTorch. Each takes the arguments of its schema."""

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
    # Two stable sorts: by score, then by class. The first takes ties in the order that it is given.
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


def rows_of(k: Tensor, block_table: Tensor | None) -> Tensor:
    """Keys as [B, S, ...], gathered from their pages. Pages that are not there are page 0."""
    if block_table is None:
        return k
    if len(k) == 0:
        return k.new_zeros(len(block_table), block_table.shape[1] * k.shape[1], *k.shape[2:])
    there = (block_table >= 0) & (block_table < len(k))
    return k[torch.where(there, block_table, 0).long()].flatten(1, 2)


def lengths_of(lengths: Tensor | None, batch: int, most: int, device: torch.device) -> Tensor:
    if lengths is None:
        return torch.full((batch,), most, device=device)
    return lengths.long().clamp(0, most)


def block_pool_keys(
    k: Tensor, block: int, mode: str, lengths: Tensor | None, block_table: Tensor | None
) -> tuple[Tensor]:
    keys = rows_of(k, block_table)
    batch, tokens = keys.shape[:2]
    block = min(block, max(tokens, 1))
    blocks = -(-tokens // block)
    length = lengths_of(lengths, batch, tokens, k.device)
    padded = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, blocks * block - tokens))
    padded = padded.unflatten(1, (blocks, block))
    token = torch.arange(blocks * block, device=k.device).view(blocks, block)
    valid = (token < length[:, None, None])[..., None, None]
    if mode == "mean":
        wide = torch.promote_types(k.dtype, torch.float32)
        total = torch.where(valid, padded, 0).sum(2, dtype=wide)
        return ((total / valid.sum(2).clamp(min=1)).to(k.dtype),)
    most = torch.where(valid, padded, -torch.inf).amax(2)
    if mode == "max":
        return (most,)
    return (torch.stack((torch.where(valid, padded, torch.inf).amin(2), most), 3),)


def block_pool_keys_update(
    k: Tensor,
    pooled: Tensor,
    block: int,
    mode: str,
    start: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor]:
    (whole,) = block_pool_keys(k, block, mode, lengths, block_table)
    tokens = rows_of(k, block_table).shape[1]
    length = lengths_of(lengths, len(start), tokens, k.device)[:, None]
    first = start.long().clamp(min=0)[:, None]
    number = torch.arange(pooled.shape[1], device=k.device)
    touched = (first < length) & (number >= first // block) & (number * block < length)
    shape = (*touched.shape, *[1] * (pooled.dim() - 2))
    pooled.copy_(torch.where(touched.view(shape), whole, pooled))
    return (pooled,)


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
    lengths: Tensor | None,
    block_table: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor]:
    """dtype: of the products, for plain PyTorch; None: at least float32."""
    queries, heads = q.shape[1:3]
    keys = rows_of(k, block_table)
    batch, rows, kv_heads = keys.shape[:3]
    row_tokens, block_rows = (1, block_k) if scoring == "max_block" else (block_k, 1)
    wide = dtype or torch.promote_types(q.dtype, torch.float32)

    last = torch.arange(queries, device=q.device)
    if q_reduce == "mean":  # rounded to the dtype of q; stands where its last query does
        (q,) = block_pool_keys(q, block_q, "mean", None, None)
        last = (block_q * torch.arange(1, q.shape[1] + 1, device=q.device) - 1).clamp(
            max=queries - 1
        )
    x = q.to(wide).unflatten(2, (kv_heads, heads // kv_heads) if kv_heads else (0, 1))
    y = keys.to(wide)
    if scoring == "minmax":
        low, high = y.unbind(3)
        z = _dots(x.clamp(max=0), low) + _dots(x.clamp(min=0), high)
        empty = (low[..., 0] > high[..., 0]).permute(0, 2, 1)[:, :, None, None]
        z = torch.where(empty, -torch.inf, z)
    else:
        z = _dots(x, y)
    z = (scale * z).flatten(1, 2)

    length = lengths_of(lengths, batch, rows * row_tokens, q.device)
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
    """Cuts a dimension into blocks; the last one is filled up."""
    size = min(size, max(x.shape[dim], 1))
    padding = [0, 0] * (x.dim() - dim - 1) + [0, -x.shape[dim] % size]
    return torch.nn.functional.pad(x, padding, value=fill).unflatten(dim, (-1, size))


def query_similarity_gate(q: Tensor, q_ref: Tensor, threshold: float) -> tuple[Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    x, y = (t.sum(1, dtype=wide).flatten(1) for t in (q, q_ref))
    return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)) >= threshold,)
