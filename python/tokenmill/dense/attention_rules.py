"""Rules for a call of attention. csrc/dense/attention/host.cpp has the same rules in the same order
and words; the contract test compares the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.operator import record_of
from .._check import (
    check,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_device_of_q,
    check_last_contiguous,
    check_longest,
    check_qkv,
    fail,
    show,
)
from .._written import check_out
from .terms import check_kind, check_mask, check_scale_and_cap, check_terms

OP = "attention"
PRECISIONS = ("accurate", "fast")
MAX_CELLS = 2**21  # of a grid; kernels hold its coordinates in float32
Arguments = record_of(OP)


def check_attention(*lowered: Any, float64: bool = False) -> None:
    a = Arguments(*lowered)
    packed = a.cu_seqlens_q is not None or a.cu_seqlens_k is not None
    check_qkv(OP, a.q, a.k, a.v, 3 if packed else 4, float64)
    check_kind(OP, a.kind, a.normalize)
    check(a.precision in PRECISIONS, OP, "precision", "must be 'accurate' or 'fast'", a.precision)
    check_scale_and_cap(OP, a.scale, a.softcap)
    for side, limit in (("left", a.window_left), ("right", a.window_right)):
        check(limit >= -1, OP, "window", f"{side} must be >= -1 (-1 = no limit)", limit)
    batch = _check_cu_seqlens(a.q, a.cu_seqlens_q, a.cu_seqlens_k, a.max_seqlen_q, a.max_seqlen_k)
    check_terms(OP, a.q, batch, a.kind, a.score_bias, a.alibi_slopes, a.sink)
    _check_grid(a, packed)
    if a.post_decay:
        check(a.kind == "softmax", OP, "post_decay", "needs kind 'softmax', not", a.kind)
        check(a.alibi_slopes is not None, OP, "post_decay", "needs alibi_slopes", a.post_decay)
    if a.bias is not None:
        rows, columns = a.q.shape[-3], a.k.shape[-3]
        if packed:
            rows = rows if a.max_seqlen_q is None else a.max_seqlen_q
            columns = columns if a.max_seqlen_k is None else a.max_seqlen_k
        _check_bias(a.bias, a.q, (batch, a.q.shape[-2], rows, columns))
    keys = a.k.shape[-3]
    check_mask(OP, a.q, batch, keys, a.mask_ranges, a.mask_q_spans, a.mask_k_spans)


def _check_cu_seqlens(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> int:
    """Checks cu_seqlens and returns the number of sequences."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
            fail(OP, missing, "must be given with its counterpart", None)
        for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if bound is not None:
                fail(OP, name, "requires cu_seqlens", bound)
        return q.shape[0]
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_cu_seqlens(OP, name, t, q)
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        rule = f"must have the length of cu_seqlens_q, {cu_seqlens_q.shape[0]}"
        fail(OP, "cu_seqlens_k", rule, cu_seqlens_k.shape[0])
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if bound is not None:
            check(bound >= 0, OP, name, "must not be negative", bound)
    return cu_seqlens_q.shape[0] - 1


def _check_grid(a: Any, packed: bool) -> None:
    check(a.grid_width >= 0, OP, "grid_width", "must not be negative (0 = no grid)", a.grid_width)
    known = a.grid_distance in ("chebyshev", "manhattan")
    rule = "must be 'chebyshev' or 'manhattan'"
    check(known, OP, "grid_distance", rule, a.grid_distance)
    check(a.grid_window >= -1, OP, "grid_window", "must be >= -1 (-1 = no limit)", a.grid_window)
    if a.grid_width == 0:
        return
    check(a.alibi_slopes is not None, OP, "grid_width", "needs alibi_slopes", a.grid_width)
    check(not packed, OP, "grid_width", "needs sequences that are not packed", a.grid_width)
    rows, columns = a.q.shape[1], a.k.shape[1]
    rule = f"must be as long as q with a grid, {rows}"
    check(rows == columns, OP, "k", rule, columns)
    rule = f"must have at most {MAX_CELLS} tokens with a grid"
    check(rows <= MAX_CELLS, OP, "q", rule, rows)


def _check_bias(bias: Tensor, q: Tensor, full: tuple[int, ...]) -> None:
    ok = bias.dim() == 4 and all(b in (1, f) for b, f in zip(bias.shape, full, strict=True))
    if not ok:
        fail(OP, "bias", f"must broadcast to [B, H, Sq, Sk] = {show(full)}", bias.shape)
    if bias.dtype not in (q.dtype, torch.float32):
        own = "" if q.dtype == torch.float32 else f"{show(q.dtype)} or "
        fail(OP, "bias", f"must be {own}float32", bias.dtype)
    check_last_contiguous(OP, "bias", bias)
    check_device_of_q(OP, "bias", bias, q)


def check_attention_values(*lowered: Any) -> None:
    """Checks on values: what lengths and offsets say."""
    a = Arguments(*lowered)
    for name, cu, bound_name, bound, total in (
        ("cu_seqlens_q", a.cu_seqlens_q, "max_seqlen_q", a.max_seqlen_q, a.q.shape[0]),
        ("cu_seqlens_k", a.cu_seqlens_k, "max_seqlen_k", a.max_seqlen_k, a.k.shape[0]),
    ):
        if cu is None:
            continue
        ends = check_cu_seqlens_values(OP, name, cu, total)
        check_longest(OP, bound_name, ends, bound)


def check_attention_out(*lowered: Any, float64: bool = False) -> None:
    *arguments, out = lowered
    check_attention(*arguments, float64=float64)
    a = Arguments(*arguments)
    check_out(OP, out, (*a.q.shape[:-1], a.v.shape[-1]), a)
