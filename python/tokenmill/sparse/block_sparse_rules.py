"""The rules for a call of block_sparse_attention. Its host.cpp in csrc has the same rules in the
same order and words; the contract test compares the two."""

from __future__ import annotations

from typing import Any

from .._check import check, check_qkv, fail, is_power_of_two
from .._library import record_of
from .._written import check_out
from ..dense.terms import check_scale, check_sink
from ..select.rules import check_block_table, check_block_table_values, check_per_request
from .rules import check_block, check_list

OP = "block_sparse_attention"
Arguments = record_of(OP)


def check_block_sparse(*lowered: Any, float64: bool = False, op: str = OP) -> None:
    a = Arguments(*lowered)
    paged = a.block_table is not None
    check_qkv(op, a.q, a.k, a.v, 4, float64, paged)
    if paged:
        page, rule = a.k.shape[1], "must have pages of a power of two of tokens"
        check(is_power_of_two(page), op, "k", rule, page)
    check_block(op, "block_q", a.block_q)
    check_block(op, "block_k", a.block_k)
    for name, number in (("num_sink", a.num_sink), ("num_recent", a.num_recent)):
        check(number >= 0, op, name, "must not be negative", number)
    alone = a.num_recent == 0 or a.causal
    check(alone, op, "num_recent", "goes with causal alone", a.num_recent)
    check_scale(op, a.scale, a.softcap)
    batch, sq, heads = a.q.shape[:3]
    kv_heads, rows = a.k.shape[2], -(-sq // a.block_q)
    fits = a.indices.dim() == 4 and a.indices.shape[0] == batch and a.indices.shape[2] == rows
    fits = fits and a.indices.shape[1] in (1, kv_heads, heads)
    shape = f"[{batch}, 1, {kv_heads} or {heads}, {rows}, K]"
    check_list(op, a.indices, a.counts, shape, fits, "q", a.q)
    check_per_request(op, "seqlens_k", a.seqlens_k, batch, "q", a.q)
    if a.sink is not None:
        check_sink(op, a.sink, a.q)
    if paged:
        if a.seqlens_k is None:
            fail(op, "seqlens_k", "must be given with block_table", None)
        check_block_table(op, a.block_table, a.k)
        requests = a.block_table.shape[0]
        check(requests == batch, op, "block_table", f"must have the batch size of q, {batch}",
              requests)  # fmt: skip


def check_block_sparse_values(*lowered: Any) -> None:
    a = Arguments(*lowered)
    check_block_table_values(OP, a.block_table, a.k, a.seqlens_k)


def check_block_sparse_out(*lowered: Any, float64: bool = False) -> None:
    *arguments, out = lowered
    check_block_sparse(*arguments, float64=float64)
    a = Arguments(*arguments)
    check_out(OP, out, (*a.q.shape[:-1], a.v.shape[-1]), a)
