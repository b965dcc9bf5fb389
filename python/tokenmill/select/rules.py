"""Sizes of keys, and checks of them, in the words of csrc/select/checks.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import (
    check,
    check_cu_seqlens,
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


def check_block_table(op: str, block_table: Tensor | None, k: Tensor) -> None:
    if block_table is None:
        return
    check(block_table.dim() == 2, op, "block_table", "must have 2 dimensions [B, P]",
          block_table.dim())  # fmt: skip
    check(block_table.dtype == torch.int32, op, "block_table", "must be int32", block_table.dtype)
    check_last_contiguous(op, "block_table", block_table)
    check_device_of(op, "block_table", block_table, "k", k)


def check_sequences(
    op: str,
    q: Tensor,
    k: Tensor,
    seqlens_k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_q: Tensor | None = None,
) -> int:
    """Checks lengths and offsets of queries, packed or not, over packed, padded or paged keys, and
    returns the number of requests.
    """
    if cu_seqlens_k is not None and cu_seqlens_q is None:
        fail(op, "cu_seqlens_q", "must be given with cu_seqlens_k", None)
    batch: int = q.shape[0]
    if cu_seqlens_q is not None:
        check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q)
        batch = cu_seqlens_q.shape[0] - 1
        if seqlens_q is not None:
            fail(op, "seqlens_q", "must be None with cu_seqlens_q", seqlens_q.shape)
    if cu_seqlens_k is not None:
        check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q)
        if cu_seqlens_k.shape[0] != batch + 1:
            rule = f"must have the length of cu_seqlens_q, {batch + 1}"
            fail(op, "cu_seqlens_k", rule, cu_seqlens_k.shape[0])
        for name, t in (("seqlens_k", seqlens_k), ("block_table", block_table)):
            if t is not None:
                fail(op, name, "must be None with cu_seqlens_k", t.shape)
        return batch
    check_block_table(op, block_table, k)
    found = batch_of(k, block_table)
    if found != batch:
        name = "k" if block_table is None else "block_table"
        fail(op, name, f"must have the batch size of q, {batch}", found)
    return batch


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
