"""Helpers of methods that list blocks of keys."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .._check import check, is_power_of_two

MAX_BLOCK = 128
CPU_ELEMENTS, GPU_ELEMENTS = 2**24, 2**26  # scores held in memory at a time
# Minimum number of queries of a stripe: few rows of scores have other bits than many on a CPU, and
# the stripes depend on the batch.
MIN_ROWS = 16


def check_block(op: str, name: str, value: int) -> None:
    ok = is_power_of_two(value) and value <= MAX_BLOCK
    check(ok, op, name, f"must be a power of two up to {MAX_BLOCK}", value)


def stripes(q: Tensor, columns: int) -> Iterator[slice]:
    """Stripes of the queries [B, Sq, H, D] whose scores over so many columns are held in memory
    together; at least one stripe, which may be empty. Several have MIN_ROWS queries or more each.
    """
    elements = CPU_ELEMENTS if q.device.type == "cpu" else GPU_ELEMENTS
    rows = max(MIN_ROWS, elements // max(q.shape[0] * q.shape[2] * columns, 1))
    first, queries = 0, q.shape[1]
    while queries - first >= rows + MIN_ROWS:
        yield slice(first, first + rows)
        first += rows
    yield slice(first, queries)


def positions(queries: int, lengths: Tensor) -> Tensor:
    """int32 [B, Sq]: positions of queries that are the last of lengths[b] tokens; negative if there
    are fewer tokens.
    """
    rows = torch.arange(queries, dtype=torch.int32, device=lengths.device)
    return lengths[:, None] - queries + rows


def for_heads(rows: Tensor, heads: int) -> Tensor:
    """[B, n] -> [B * heads * n]."""
    return rows[:, None].expand(-1, heads, -1).reshape(-1).contiguous()


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, in its order: that of torch.sum depends on shapes and strides. For
    dimensions with few elements.
    """
    return functools.reduce(torch.add, x.unbind(dim))


def split_blocks(indices: Tensor, counts: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The lists with each block split into smaller blocks."""
    if parts == 1:
        return indices, counts
    part = torch.arange(parts, dtype=torch.int32, device=indices.device)
    return (indices[..., None] * parts + part).flatten(-2), counts * parts
