"""Sizes of keys, and checks of them, in the words of csrc/select/checks.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import (
    check,
    check_cu_seqlens_values,
    check_device_of,
    check_last_contiguous,
    fail,
)


def check_per_request(
    op: str, name: str, t: Tensor | None, batch: int, other: str, first: Tensor
) -> None:
    if t is None:
        return
    check(list(t.shape) == [batch], op, name, f"must have shape [{batch}]", t.shape)
    check(t.dtype == torch.int32, op, name, "must be int32", t.dtype)
    check_last_contiguous(op, name, t)
    check_device_of(op, name, t, other, first)


def check_length_values(op: str, name: str, t: Tensor | None, longest: int) -> None:
    for length in [] if t is None else t.tolist():
        check(0 <= length <= longest, op, name, f"must be 0 to {longest}", length)


def batch_of(k: Tensor, block_table: Tensor | None) -> int:
    """Number of requests of keys [B, S, ...], or of a block table."""
    return k.shape[0] if block_table is None else block_table.shape[0]


def rows_of_request(k: Tensor, block_table: Tensor | None) -> int:
    return k.shape[1] if block_table is None else block_table.shape[1] * k.shape[1]


def keys_of(a: Any) -> int:
    """Number of keys of the longest request; of packed sequences, of all requests."""
    if a.cu_seqlens_k is not None:
        return int(a.k.shape[0])
    return rows_of_request(a.k, a.block_table)


def check_packed_values(op: str, a: Any) -> None:
    """Offsets of packed queries and keys."""
    if a.cu_seqlens_q is not None:
        check_cu_seqlens_values(op, "cu_seqlens_q", a.cu_seqlens_q, a.q.shape[0])
    if a.cu_seqlens_k is not None:
        check_cu_seqlens_values(op, "cu_seqlens_k", a.cu_seqlens_k, a.k.shape[0])


def check_block_table_values(
    op: str, block_table: Tensor | None, k: Tensor, lengths: Tensor | None
) -> None:
    """The pages of the first lengths[b] rows must exist."""
    if block_table is None or k.shape[1] == 0:
        return
    pages, page_size = k.shape[:2]
    first = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    used = torch.ones_like(block_table, dtype=torch.bool)
    if lengths is not None:
        used = first < lengths[:, None]
    bad = block_table[used & ((block_table < 0) | (block_table >= pages))].tolist()
    if bad:
        fail(op, "block_table", f"must hold pages below {pages} up to the length", bad[0])
