"""Which calls of attention the kernels of compute capability 9.0 take: launch_sm90.h and
launch_backward_sm90.h of csrc/dense/attention have the same rules in the same order."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .attention_rules import Arguments

LEAST_QUERIES = 32  # of a tile of 64 rows, and of one of 64 or 128
HEAD_DIMS = (64, 128)
MOST_TILES = 2**30


def unsupported_sm90(*lowered: Any, out: Tensor | None = None) -> list[str]:
    """Why it does not take a call: "argument: rule; got value" each."""
    a = Arguments(*lowered)
    why = []

    def check(holds: bool, argument: str, rule: str, value: object) -> None:
        if not holds:
            why.append(f"{argument}: {rule}; got {value}")

    tokens, heads, columns = a.q.shape[-3:]
    check(a.q.dtype != torch.float32, "q", "must be float16 or bfloat16", a.q.dtype)
    check(columns in HEAD_DIMS, "q", "must have head_dim 64 or 128", columns)
    check(a.v.shape[-1] == columns, "v", "must have the head_dim of q", a.v.shape[-1])
    check(a.kind in ("softmax", "sigmoid"), "kind", "must be 'softmax' or 'sigmoid'", a.kind)
    check(a.normalize == "none", "normalize", "must be 'none'", a.normalize)
    for name in ("mask_ranges", "mask_q_spans", "bias", "alibi_slopes"):
        check(getattr(a, name) is None, name, "must be None", "a tensor")
    scale = _float32(columns**-0.5 if a.scale is None else a.scale)
    check(scale >= 2**-126, "scale", "must be 2^-126 or more in float32", a.scale)
    softcap = _float32(a.softcap)
    capped = softcap <= 0 or (softcap < _float32(1e38) and scale >= 2**-64 * softcap)
    check(capped, "softcap", "must be below 1e38 and at most 2^64 scale", a.softcap)
    sequences = 1 if a.cu_seqlens_q is None else max(a.cu_seqlens_q.shape[0] - 1, 1)
    rule = f"must have {LEAST_QUERIES} tokens for each sequence"
    check(tokens >= LEAST_QUERIES * sequences, "q", rule, tokens)
    check(a.k.shape[-3] > 0, "k", "must have tokens", a.k.shape[-3])
    if a.cu_seqlens_q is None:
        tiles = a.q.shape[0] * heads * -(-tokens // 64)
    else:
        tiles = heads * (tokens // 64 + a.cu_seqlens_q.shape[0])
    check(tiles <= MOST_TILES, "q", "must have at most 2^30 tiles of 64 rows", tiles)
    for name, t in (("q", a.q), ("k", a.k), ("v", a.v), ("out", out)):
        if t is None:
            continue
        past = t.data_ptr() % 16
        check(past == 0, name, "must start at a multiple of 16 bytes", f"{past} bytes behind one")
        rule = f"must have strides that are multiples of 8, of {t.shape[-1]} or more"
        check(past > 0 or _can_map(t), name, rule, t.stride())
    return why


def unsupported_sm90_backward(*lowered: Any) -> list[str]:
    """The same of the gradient of a call."""
    a = Arguments(*lowered)
    why = []

    def check(holds: bool, argument: str, rule: str, value: object) -> None:
        if not holds:
            why.append(f"{argument}: {rule}; got {value}")

    width = a.q.shape[-1]
    check(a.q.dtype != torch.float32, "q", "must be float16 or bfloat16", a.q.dtype)
    check(width in HEAD_DIMS, "q", "must have head_dim 64 or 128", width)
    check(a.v.shape[-1] == width, "v", "must have the head_dim of q", a.v.shape[-1])
    check(a.kind in ("softmax", "sigmoid"), "kind", "must be 'softmax' or 'sigmoid'", a.kind)
    check(a.normalize == "none", "normalize", "must be 'none'", a.normalize)
    for name in ("mask_ranges", "mask_q_spans", "bias", "alibi_slopes"):
        check(getattr(a, name) is None, name, "must be None", "a tensor")
    check(a.softcap == 0, "softcap", "must be 0", a.softcap)
    check(a.cu_seqlens_q is None, "cu_seqlens_q", "must be None", "a tensor")
    summed = a.kind == "sigmoid" and a.score_bias is not None and a.score_bias.requires_grad
    check(not summed, "score_bias", "must not require a gradient", "a tensor that does")
    check(a.q.shape[-3] >= LEAST_QUERIES, "q", f"must have {LEAST_QUERIES} tokens", a.q.shape[-3])
    check(a.k.shape[-3] > 0, "k", "must have tokens", a.k.shape[-3])
    for name in ("q", "k", "v"):
        rule = "must lie at multiples of 16 bytes, its rows apart"
        check(_can_map(getattr(a, name)), name, rule, getattr(a, name).stride())
    return why


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def _can_map(t: Tensor) -> bool:
    """Strides of extents of 1 do not matter, and a map has 40 bits for the others, in bytes."""
    strides = (s for s, extent in zip(t.stride()[:-1], t.shape[:-1], strict=True) if extent > 1)
    fit = all(t.shape[-1] <= s < 2**39 and s % 8 == 0 for s in strides)
    return t.data_ptr() % 16 == 0 and fit
