"""A KV cache: its capacity, and its rules for functions composed of operators, in the words of
csrc/core/kv_cache_checks.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import (
    check,
    check_cu_seqlens,
    check_device_of,
    check_device_of_q,
    check_dtype,
    check_dtype_of,
    check_head_dim,
    check_last_contiguous,
    fail,
    is_any,
    is_power_of_two,
    show,
)

# Latent caches: 512 channels that are also the values, and 64 that carry positions.
MAX_CACHE_DIM, MAX_CACHE_VALUE_DIM = 576, 512


def check_cache_scale(
    op: str, name: str, t: Tensor | None, of: str, cache: Tensor, rows: torch.dtype
) -> None:
    """Checks the scale of keys or values of a cache [P, page size, Hk, D]: [1], [Hk] or [P, page
    size, Hk]. float64 is also accepted with rows in float64.
    """
    if t is None:
        return
    rule = "requires a cache in float8_e4m3fn"
    check(cache.dtype == torch.float8_e4m3fn, op, name, rule, cache.dtype)
    shape, each, every = list(t.shape), [cache.shape[2]], list(cache.shape[:3])
    if not is_any(shape, [1], each, every):
        fail(op, name, f"must have shape [1], {show(each)} or {show(every)}", t.shape)
    wide = torch.promote_types(rows, torch.float32)
    either = "" if wide == torch.float32 else f" or {show(wide)}"
    check(t.dtype in (torch.float32, wide), op, name, f"must be float32{either}", t.dtype)
    check_device_of(op, name, t, of, cache)


def check_cache(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    paged: bool,
    float64: bool,
    cu_seqlens_q: Tensor | None = None,
) -> int:
    """q [B, Sq, H, D], packed [T, H, D], against a dense cache [B, S, Hk, D] or pages [P, page
    size, Hk, D]. Returns the number of requests."""
    caches = (("k_cache", k), ("v_cache", v))
    if cu_seqlens_q is None:
        check(q.dim() == 4, op, "q", "must have 4 dimensions [B, Sq, H, D]", q.dim())
    else:
        check(q.dim() == 3, op, "q", "must have 3 dimensions [T, H, D] (packed)", q.dim())
    rule = "must have 4 dimensions [B, S, Hk, D] (in pages: [P, page size, Hk, D])"
    for name, t in caches:
        check(t.dim() == 4, op, name, rule, t.dim())
    check_dtype(op, "q", q, float64=float64)
    if k.dtype not in (q.dtype, torch.float8_e4m3fn):
        rule = f"must have the dtype of q, {show(q.dtype)}, or float8_e4m3fn"
        fail(op, "k_cache", rule, k.dtype)
    check_dtype_of(op, "v_cache", v, "k_cache", k)
    for name, t in caches:
        check_device_of_q(op, name, t, q)
    for name, t in (("q", q), *caches):
        check_last_contiguous(op, name, t)
        check_head_dim(op, name, t, MAX_CACHE_VALUE_DIM if name == "v_cache" else MAX_CACHE_DIM)
    if k.shape[3] != q.shape[-1]:
        fail(op, "k_cache", f"must have the head dimension of q, {q.shape[-1]}", k.shape[3])
    if v.shape[:-1] != k.shape[:-1]:
        rule = f"must have the shape of k_cache up to the head dimension, {show(k.shape)}"
        fail(op, "v_cache", rule, v.shape)
    heads, kv_heads, size = q.shape[-2], k.shape[2], k.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        fail(op, "k_cache", f"number of heads must divide that of q, {heads} (GQA)", kv_heads)
    if cu_seqlens_q is not None:
        check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if paged:
        rule = "must have pages of a power of two of tokens"
        check(is_power_of_two(size), op, "k_cache", rule, size)
    elif k.shape[0] != batch:
        fail(op, "k_cache", f"must have the batch size of q, {batch}", k.shape[0])
    return batch


def check_lengths(
    op: str, q: Tensor, batch: int, seqlens_k: Tensor, block_table: Tensor | None
) -> None:
    check_int32(op, "seqlens_k", seqlens_k)
    if list(seqlens_k.shape) != [batch]:
        fail(op, "seqlens_k", f"must have shape [{batch}]", seqlens_k.shape)
    check_last_contiguous(op, "seqlens_k", seqlens_k)
    check_device_of_q(op, "seqlens_k", seqlens_k, q)
    if block_table is not None:
        check_int32(op, "block_table", block_table)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            fail(op, "block_table", f"must have shape [{batch}, pages]", block_table.shape)
        check_last_contiguous(op, "block_table", block_table)
        check_device_of_q(op, "block_table", block_table, q)


def check_int32(op: str, argument: str, t: Tensor) -> None:
    check(t.dtype == torch.int32, op, argument, "must be int32", t.dtype)


def capacity(k: Tensor, block_table: Tensor | None) -> int:
    """Maximum number of keys of a request."""
    if block_table is None:
        return k.shape[1]
    return block_table.shape[1] * k.shape[1] if k.shape[0] > 0 else 0


def check_lengths_values(
    op: str,
    k: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor | None,
    *,
    pages_may_lack: bool = False,
) -> None:
    """Checks on values: lengths within the cache, pages that exist."""
    maximum, pages, size = capacity(k, block_table), k.shape[0], k.shape[1]
    table = None if block_table is None or pages_may_lack else block_table.tolist()
    for b, length in enumerate(seqlens_k.tolist()):
        if not 0 <= length <= maximum:
            rule = f"must be 0 to what the cache holds of a request, {maximum}"
            fail(op, "seqlens_k", rule, length)
        for page in [] if table is None else table[b][: -(-length // size)]:
            if not 0 <= page < pages:
                rule = f"must name pages below {pages} where keys lie"
                fail(op, "block_table", rule, page)
