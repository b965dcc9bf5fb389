"""Rules for a call of block_sparse_attention. Its host.cpp in csrc has the same rules in the same
order and words; the contract test compares the two.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.operator import record_of
from .._check import (
    MAX_HEAD_DIM,
    check,
    check_cu_seqlens_values,
    check_last_contiguous,
    check_qkv,
    fail,
    is_any,
    is_power_of_two,
)
from .._kv_cache import MAX_CACHE_DIM, MAX_CACHE_VALUE_DIM
from .._written import check_out
from ..dense.terms import check_scale_and_cap, check_sink
from ..select.rules import (
    check_block_table,
    check_block_table_values,
    check_per_request,
    check_sequences,
)
from .rules import check_block, check_list

OP = "block_sparse_attention"
Arguments = record_of(OP)


def is_wide(t: Any) -> bool:
    """Whether q or v has the wide head_dim of latent caches, which is forward only."""
    return isinstance(t, Tensor) and t.dim() > 0 and t.shape[-1] > MAX_HEAD_DIM


def check_block_sparse(*lowered: Any, float64: bool = False, op: str = OP) -> None:
    a = Arguments(*lowered)
    _check_rows(op, a, float64)
    batch = int(a.q.shape[0])
    if a.cu_seqlens_q is not None:
        batch = check_sequences(
            op, a.q, a.k, a.seqlens_k, a.cu_seqlens_q, a.cu_seqlens_k, a.block_table
        )
    check_block(op, "block_q", a.block_q)
    check_block(op, "block_k", a.block_k)
    for name, number in (("num_sink", a.num_sink), ("num_recent", a.num_recent)):
        check(number >= 0, op, name, "must not be negative", number)
    alone = a.num_recent == 0 or a.causal
    check(alone, op, "num_recent", "requires causal", a.num_recent)
    check_scale_and_cap(op, a.scale, a.softcap)
    shape = list_shape(a, batch)
    fits = a.indices.dim() == len(shape) + 1
    fits = fits and [*a.indices.shape[:-3], a.indices.shape[-2]] == [*shape[:-2], shape[-1]]
    fits = fits and is_any(a.indices.shape[-3], 1, a.k.shape[-2], a.q.shape[-2])
    heads = f"1, {a.k.shape[-2]} or {a.q.shape[-2]}"
    text = ", ".join([*map(str, shape[:-2]), "heads", str(shape[-1])])
    check_list(op, a.indices, a.counts, f"[{text}, K] with {heads} heads", fits, "q", a.q)
    check_per_request(op, "seqlens_k", a.seqlens_k, batch, "q", a.q)
    if a.sink is not None:
        check_sink(op, a.sink, a.q)
    if a.block_table is not None:
        if a.seqlens_k is None:
            fail(op, "seqlens_k", "must be given with block_table", None)
        check_block_table(op, a.block_table, a.k)
        requests = a.block_table.shape[0]
        check(requests == batch, op, "block_table", f"must have the batch size of q, {batch}",
              requests)  # fmt: skip


def _check_rows(op: str, a: Any, float64: bool) -> None:
    """Queries may be packed over keys that are not, or over pages."""
    q = a.q
    maximum = (
        (MAX_CACHE_DIM, MAX_CACHE_VALUE_DIM) if a.block_q == 1 else (MAX_HEAD_DIM, MAX_HEAD_DIM)
    )
    if a.cu_seqlens_k is not None and a.cu_seqlens_q is None:
        fail(op, "cu_seqlens_q", "must be given with cu_seqlens_k", None)
    if a.cu_seqlens_k is not None:
        return check_qkv(op, q, a.k, a.v, 3, float64, False, *maximum)
    if a.cu_seqlens_q is not None:
        check(q.dim() == 3, op, "q", "must have 3 dimensions [T, H, D] (packed)", q.dim())
        check_last_contiguous(op, "q", q)
        q = q[None]
    paged = a.block_table is not None
    check_qkv(op, q, a.k, a.v, 4, float64, paged or a.cu_seqlens_q is not None, *maximum)
    if paged:
        page, rule = a.k.shape[1], "must have pages of a power of two of tokens"
        check(is_power_of_two(page), op, "k", rule, page)


def list_shape(a: Any, batch: int) -> list[int]:
    """[B, H, R], or for packed queries [H, R], where the lists of a request start at row
    cu_seqlens_q[b] // block_q + b.
    """
    tokens, heads = a.q.shape[-3:-1]
    if a.cu_seqlens_q is not None:
        return [heads, tokens // a.block_q + batch]
    return [batch, heads, -(-tokens // a.block_q)]


def check_block_sparse_values(*lowered: Any) -> None:
    a = Arguments(*lowered)
    for name, ends, tokens in (("cu_seqlens_q", a.cu_seqlens_q, a.q.shape[0]),
                               ("cu_seqlens_k", a.cu_seqlens_k, a.k.shape[0])):  # fmt: skip
        if ends is not None:
            check_cu_seqlens_values(OP, name, ends, tokens)
    check_block_table_values(OP, a.block_table, a.k, a.seqlens_k)


def check_block_sparse_out(*lowered: Any, float64: bool = False) -> None:
    *arguments, out = lowered
    check_block_sparse(*arguments, float64=float64)
    a = Arguments(*arguments)
    check_out(OP, out, (*a.q.shape[:-1], a.v.shape[-1]), a)
