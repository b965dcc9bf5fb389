"""What a call of attention must keep to. csrc/dense/attention/host.cpp has the same rules in the
same order and words; the contract test compares the two."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..check import check, check_dtype, check_last_contiguous, fail, show

OP = "attention"
KINDS = ("softmax", "sigmoid")
PRECISIONS = ("accurate", "fast")
MAX_HEAD_DIM = 256


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    scale: float,
    score_bias: Tensor | None,
    score_bias_value: float,
    score_bias_neg_log_n: bool,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    softcap: float,
    causal: bool,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    deterministic: bool,
    precision: str,
    *,
    float64: bool = False,
) -> None:
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_qkv(q, k, v, packed, float64)
    check(kind in KINDS, OP, "kind", "must be 'softmax' or 'sigmoid'", kind)
    check(precision in PRECISIONS, OP, "precision", "must be 'accurate' or 'fast'", precision)
    check(math.isfinite(scale), OP, "scale", "must be finite", scale)
    check(
        math.isfinite(softcap) and softcap >= 0,
        OP,
        "softcap",
        "must be finite and not negative (0 = off)",
        softcap,
    )
    check(window_left >= -1, OP, "window", "left must be >= -1 (-1 = no limit)", window_left)
    check(window_right >= -1, OP, "window", "right must be >= -1 (-1 = no limit)", window_right)
    batch = _check_cu_seqlens(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    heads = q.shape[-2]
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, t in (("score_bias", score_bias), ("alibi_slopes", alibi_slopes)):
        if t is None:
            continue
        if list(t.shape) != [heads] and list(t.shape) != [batch, heads]:
            fail(OP, name, f"must have shape [{heads}] or [{batch}, {heads}]", t.shape)
        _check_small(name, t, q, wide)
    if sink is not None:
        check(kind == "softmax", OP, "sink", "needs kind 'softmax', not", kind)
        if list(sink.shape) != [heads]:
            fail(OP, "sink", f"must have shape [{heads}]", sink.shape)
        _check_small("sink", sink, q, wide)
    if bias is not None:
        if packed:
            rows = q.shape[0] if max_seqlen_q is None else max_seqlen_q
            columns = k.shape[0] if max_seqlen_k is None else max_seqlen_k
        else:
            rows, columns = q.shape[1], k.shape[1]
        _check_bias(bias, q, (batch, heads, rows, columns))


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, packed: bool, float64: bool) -> None:
    rank, layout = (3, "[T, H, D] (packed)") if packed else (4, "[B, S, H, D]")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != rank:
            fail(OP, name, f"must have {rank} dimensions {layout}", t.dim())
    check_dtype(OP, "q", q, float64=float64)
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            fail(OP, name, f"must have the dtype of q, {show(q.dtype)}", t.dtype)
        if t.device != q.device:
            fail(OP, name, f"must be on the device of q, {show(q.device)}", t.device)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_last_contiguous(OP, name, t)
        if not 1 <= t.shape[-1] <= MAX_HEAD_DIM:
            fail(OP, name, f"must have a head dimension of 1 to {MAX_HEAD_DIM}", t.shape[-1])
    if k.shape[-1] != q.shape[-1]:
        fail(OP, "k", f"must have the head dimension of q, {q.shape[-1]}", k.shape[-1])
    if not packed and k.shape[0] != q.shape[0]:
        fail(OP, "k", f"must have the batch size of q, {q.shape[0]}", k.shape[0])
    if v.shape[:-1] != k.shape[:-1]:
        rule = f"must have the shape of k up to the head dimension, {show(k.shape)}"
        fail(OP, "v", rule, v.shape)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        fail(OP, "k", f"number of heads must divide that of q, {heads} (GQA)", kv_heads)


def _check_cu_seqlens(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> int:
    """The number of sequences."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
            fail(OP, missing, "must be given with its counterpart", None)
        for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if bound is not None:
                fail(OP, name, "goes with cu_seqlens alone", bound)
        return q.shape[0]
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check(t.dtype == torch.int32, OP, name, "must be int32", t.dtype)
        check(
            t.dim() == 1 and t.shape[0] >= 1,
            OP,
            name,
            "must have 1 dimension of at least 1 element",
            t.shape,
        )
        check_last_contiguous(OP, name, t)
        if t.device != q.device:
            fail(OP, name, f"must be on the device of q, {show(q.device)}", t.device)
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        rule = f"must have the length of cu_seqlens_q, {cu_seqlens_q.shape[0]}"
        fail(OP, "cu_seqlens_k", rule, cu_seqlens_k.shape[0])
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if bound is not None:
            check(bound >= 0, OP, name, "must not be negative", bound)
    return cu_seqlens_q.shape[0] - 1


def _check_small(name: str, t: Tensor, q: Tensor, dtype: torch.dtype) -> None:
    check(t.dtype == dtype, OP, name, "must be float32", t.dtype)
    check_last_contiguous(OP, name, t)
    if t.device != q.device:
        fail(OP, name, f"must be on the device of q, {show(q.device)}", t.device)


def _check_bias(bias: Tensor, q: Tensor, full: tuple[int, ...]) -> None:
    ok = bias.dim() == 4 and all(b in (1, f) for b, f in zip(bias.shape, full, strict=True))
    if not ok:
        fail(OP, "bias", f"must broadcast to [B, H, Sq, Sk] = {show(full)}", bias.shape)
    if bias.dtype not in (q.dtype, torch.float32):
        fail(OP, "bias", f"must be {show(q.dtype)} or float32", bias.dtype)
    check_last_contiguous(OP, "bias", bias)
    if bias.device != q.device:
        fail(OP, "bias", f"must be on the device of q, {show(q.device)}", bias.device)


def check_attention_values(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    """The rules on values: what the lengths say. rest is the lowered list from kind on."""
    cu_q, cu_k, max_q, max_k = rest[12:16]
    for name, cu, bound_name, bound, total in (
        ("cu_seqlens_q", cu_q, "max_seqlen_q", max_q, q.shape[0]),
        ("cu_seqlens_k", cu_k, "max_seqlen_k", max_k, k.shape[0]),
    ):
        if cu is None:
            continue
        ends = cu.tolist()
        check(ends[0] == 0, OP, name, "must start at 0", ends[0])
        check(ends == sorted(ends), OP, name, "must not decrease", ends)
        if ends[-1] != total:
            fail(OP, name, f"must end at the number of tokens, {total}", ends[-1])
        longest = max((b - a for a, b in itertools.pairwise(ends)), default=0)
        if bound is not None and bound < longest:
            fail(OP, bound_name, f"must be at least the longest sequence, {longest}", bound)
