"""Rules for a call of sparse_decode_attention. csrc/sparse/sparse_decode_attention/host.cpp has the
same rules in the same order and words; the contract test compares the two.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.operator import record_of
from .._check import (
    MAX_HEAD_DIM,
    check,
    check_device_of_q,
    check_dtype_of,
    check_last_contiguous,
    fail,
    show,
)
from .._kv_cache import (
    capacity,
    check_cache,
    check_cache_scale,
    check_int32,
    check_lengths,
    check_lengths_values,
)
from .._written import check_out
from ..dense.terms import check_scale_and_cap, check_small, check_terms
from .rules import check_block

OP = "sparse_decode_attention"
MAX_SPLITS = 1024
Arguments = record_of(OP)


def check_sparse_decode(*lowered: Any, float64: bool = False, op: str = OP) -> None:
    a = Arguments(*lowered)
    q, k_cache = a.q, a.k_cache
    check_cache(op, q, k_cache, a.v_cache, a.block_table is not None, float64)
    check_scale_and_cap(op, a.scale, a.softcap)
    check_block(op, "block_k", a.block_k)
    for name, number in (("num_sink", a.num_sink), ("num_recent", a.num_recent)):
        check(number >= 0, op, name, "must not be negative", number)
    splits = f"must be 0 (automatic) to {MAX_SPLITS}"
    check(0 <= a.num_splits <= MAX_SPLITS, op, "num_splits", splits, a.num_splits)
    modes = "must be 'absolute' or 'cache'"
    check(a.pos_mode in ("absolute", "cache"), op, "pos_mode", modes, a.pos_mode)
    rule = "'cache' requires one query token; q has"
    check(a.pos_mode == "absolute" or q.shape[1] <= 1, op, "pos_mode", rule, q.shape[1])
    check_lengths(op, q, q.shape[0], a.seqlens_k, a.block_table)
    check_cache_scale(op, "k_scale", a.k_scale, "k_cache", k_cache, q)
    check_cache_scale(op, "v_scale", a.v_scale, "k_cache", k_cache, q)
    _check_lists(op, q, k_cache, a.indices, a.counts)
    longest = capacity(k_cache, a.block_table)
    if a.pos_mode == "cache":
        longest = min(longest, a.num_sink + a.indices.shape[2] * a.block_k + a.num_recent)
    check_rope(op, q, a.cos, a.sin, max(longest, 1))
    _check_extra(op, q, k_cache, a.v_cache, a.extra_k, a.extra_v, a.extra_log_count)
    check_terms(op, q, q.shape[0], "softmax", None, None, a.sink)


def _check_lists(op: str, q: Tensor, k_cache: Tensor, indices: Tensor, counts: Tensor) -> None:
    batch, heads = q.shape[0], (1, k_cache.shape[2], q.shape[2])
    rule = f"must have shape [{batch}, heads, K] with 1, {heads[1]} or {heads[2]} heads"
    shape = indices.dim() == 3 and indices.shape[0] == batch and indices.shape[1] in heads
    check(shape, op, "indices", rule, indices.shape)
    if counts.shape != indices.shape[:2]:
        fail(op, "counts", f"must have shape {show(indices.shape[:2])}", counts.shape)
    for name, t in (("indices", indices), ("counts", counts)):
        check_int32(op, name, t)
        check_last_contiguous(op, name, t)
        check_device_of_q(op, name, t, q)


def check_rope(op: str, q: Tensor, cos: Tensor | None, sin: Tensor | None, longest: int) -> None:
    if cos is None or sin is None:
        return
    pairs = q.shape[3] // 2
    shape = cos.dim() == 2 and cos.shape[0] >= longest and 1 <= cos.shape[1] <= pairs
    rule = f"must have shape [positions, pairs], {longest} positions or more, 1 to {pairs} pairs"
    check(shape, op, "rope", rule, cos.shape)
    check(sin.shape == cos.shape, op, "rope", "must have cos and sin of one shape", sin.shape)
    for t in (cos, sin):
        check_small(op, "rope", t, q)


def _check_extra(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    extra_log_count: Tensor | None,
) -> None:
    both = (extra_k is None) == (extra_v is None)
    check(both, op, "extra_v", "must be given with extra_k, and only then", extra_v is not None)
    if extra_k is None or extra_v is None:
        if extra_log_count is not None:
            fail(op, "extra_log_count", "needs extra_k and extra_v", extra_log_count.shape)
        return
    extras = (("extra_k", extra_k, k_cache), ("extra_v", extra_v, v_cache))
    entries = extra_k.shape[1] if extra_k.dim() == 4 else -1
    for name, t, cache in extras:
        wanted = [q.shape[0], max(entries, 0), *cache.shape[2:]]
        if list(t.shape) != wanted:
            fail(op, name, f"must have shape {show(wanted)}", t.shape)
        check_dtype_of(op, name, t, "q", q)
        check_last_contiguous(op, name, t)
        check_device_of_q(op, name, t, q)
    if extra_log_count is not None:
        wanted = [q.shape[0], k_cache.shape[2], entries]
        if list(extra_log_count.shape) != wanted:
            fail(op, "extra_log_count", f"must have shape {show(wanted)}", extra_log_count.shape)
        check_small(op, "extra_log_count", extra_log_count, q)


def check_sparse_decode_values(*lowered: Any) -> None:
    a = Arguments(*lowered)
    check_lengths_values(OP, a.k_cache, a.seqlens_k, a.block_table, pages_may_lack=True)


def check_sparse_decode_out(*lowered: Any, float64: bool = False) -> None:
    *arguments, out = lowered
    check_sparse_decode(*arguments, float64=float64)
    a = Arguments(*arguments)
    check_out(OP, out, (*a.q.shape[:-1], a.v_cache.shape[-1]), a)


def unsupported(backend: str, *lowered: Any) -> list[str]:
    a = Arguments(*lowered)
    turned = 0 if a.cos is None else 2 * a.cos.shape[-1]
    if backend == "triton" and a.q.shape[-1] > MAX_HEAD_DIM and turned > MAX_HEAD_DIM:
        return [f"of wider keys it turns at most {MAX_HEAD_DIM} columns; got {turned}"]
    return []
