"""Rules for a call of attention_decode. csrc/dense/attention_decode/host.cpp has the same rules in
the same order and words; the contract test compares the two.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.operator import record_of
from .._check import (
    MAX_HEAD_DIM,
    check,
    check_cu_seqlens_values,
    check_longest,
    fail,
)
from .._kv_cache import (
    check_cache,
    check_cache_scale,
    check_lengths,
    check_lengths_values,
)
from .._written import check_out
from ..masks import MASKS, NO_MASK, Lowered, Masks, Prefix, Segments, lower_mask
from .terms import check_kind, check_mask, check_scale_and_cap, check_terms

OP = "attention_decode"
MAX_SPLITS = 1024
Arguments = record_of(OP)


def check_decode(*lowered: Any, float64: bool = False) -> None:
    a = Arguments(*lowered)
    packed, paged = a.cu_seqlens_q is not None, a.block_table is not None
    batch = check_cache(OP, a.q, a.k_cache, a.v_cache, paged, float64, a.cu_seqlens_q)
    check_kind(OP, a.kind, a.normalize)
    check_scale_and_cap(OP, a.scale, a.softcap)
    for side, limit in (("left", a.window_left), ("right", a.window_right)):
        check(limit >= -1, OP, "window", f"{side} must be >= -1 (-1 = no limit)", limit)
    if a.max_seqlen_q is not None:
        check(packed, OP, "max_seqlen_q", "requires cu_seqlens_q", a.max_seqlen_q)
        check(a.max_seqlen_q >= 0, OP, "max_seqlen_q", "must not be negative", a.max_seqlen_q)
    splits = f"must be 0 (automatic) to {MAX_SPLITS}"
    check(0 <= a.num_splits <= MAX_SPLITS, OP, "num_splits", splits, a.num_splits)
    schedules = "must be 'auto', 'split' or 'stream_k'"
    known = a.schedule in ("auto", "split", "stream_k")
    check(known, OP, "schedule", schedules, a.schedule)
    if a.num_splits > 0:
        rule = f"must be 'auto' or 'split' with num_splits {a.num_splits}"
        check(a.schedule != "stream_k", OP, "schedule", rule, a.schedule)
    check_lengths(OP, a.q, batch, a.seqlens_k, a.block_table)
    check_cache_scale(OP, "k_scale", a.k_scale, "k_cache", a.k_cache, a.q)
    check_cache_scale(OP, "v_scale", a.v_scale, "k_cache", a.k_cache, a.q)
    check_terms(OP, a.q, batch, a.kind, a.score_bias, a.alibi_slopes, a.sink)
    keys = a.k_cache.shape[1] * (a.block_table.shape[1] if paged else 1)
    for name in ("mask_q_spans", "mask_k_spans") if packed else ():
        if (spans := getattr(a, name)) is not None:
            fail(OP, name, "must not be given with cu_seqlens_q", spans.shape)
    check_mask(OP, a.q, batch, keys, a.mask_ranges, a.mask_q_spans, a.mask_k_spans)


def check_decode_values(*lowered: Any) -> None:
    a = Arguments(*lowered)
    if a.cu_seqlens_q is not None:
        ends = check_cu_seqlens_values(OP, "cu_seqlens_q", a.cu_seqlens_q, a.q.shape[0])
        check_longest(OP, "max_seqlen_q", ends, a.max_seqlen_q)
    check_lengths_values(OP, a.k_cache, a.seqlens_k, a.block_table)


def check_decode_out(*lowered: Any, float64: bool = False) -> None:
    *arguments, out = lowered
    check_decode(*arguments, float64=float64)
    a = Arguments(*arguments)
    check_out(OP, out, (*a.q.shape[:-1], a.v_cache.shape[-1]), a)


def unsupported(backend: str, *lowered: Any) -> list[str]:
    a = Arguments(*lowered)
    widest = max(a.q.shape[-1], a.v_cache.shape[-1])
    ragged = a.cu_seqlens_q is not None or not a.causal
    if backend == "cuda" and ragged and widest > MAX_HEAD_DIM:
        rule = f"beyond {MAX_HEAD_DIM} its queries are causal and not packed; got {widest}"
        return [f"with head dimensions {rule}"]
    return []


def lower_cache_mask(mask: Masks, q: Tensor, causal: bool, cu_seqlens_q: Tensor | None) -> Lowered:
    """Key positions are relative to the request; a prefix mask is refused because it needs its
    length.
    """
    if mask is None:
        return NO_MASK
    several = isinstance(mask, tuple | list) and not isinstance(mask, MASKS)
    for m in mask if several else (mask,):
        if isinstance(m, Prefix):
            fail(OP, "mask", "must not be a prefix with a cache", "prefix")
        if cu_seqlens_q is not None and isinstance(m, Segments):
            fail(OP, "mask", "must be only ranges with cu_seqlens_q", "segments")
    return lower_mask(
        OP, mask, q, 0, causal=causal, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_q
    )
