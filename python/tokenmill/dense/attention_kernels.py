"""Which calls of attention the kernels of compute capability 9.0 take: launch_sm90.h and
launch_backward_sm90.h of csrc/dense/attention have the same rules in the same order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_rules import Arguments

LEAST_QUERIES = 32  # of a tile of 64 rows, and of one of 64 or 128
HEAD_DIMS = (64, 128)
BACKWARD_HEAD_DIMS = (64, 128)


def unsupported_sm90(*lowered: Any) -> list[str]:
    """Why it does not take a call: "argument: rule; got value" each."""
    a = Arguments(*lowered)
    why = []

    def check(holds: bool, argument: str, rule: str, value: object) -> None:
        if not holds:
            why.append(f"{argument}: {rule}; got {value}")

    check(a.q.dtype != torch.float32, "q", "must be float16 or bfloat16", a.q.dtype)
    check(a.q.shape[-1] in HEAD_DIMS, "q", "must have head_dim 64 or 128", a.q.shape[-1])
    check(a.v.shape[-1] == a.q.shape[-1], "v", "must have the head_dim of q", a.v.shape[-1])
    check(a.kind in ("softmax", "sigmoid"), "kind", "must be 'softmax' or 'sigmoid'", a.kind)
    check(a.normalize == "none", "normalize", "must be 'none'", a.normalize)
    for name in ("mask_ranges", "mask_q_spans", "bias", "alibi_slopes"):
        check(getattr(a, name) is None, name, "must be None", "a tensor")
    check(a.scale is None or a.scale > 0, "scale", "must be above 0", a.scale)
    check(a.q.shape[-3] >= LEAST_QUERIES, "q", f"must have {LEAST_QUERIES} tokens", a.q.shape[-3])
    check(a.k.shape[-3] > 0, "k", "must have tokens", a.k.shape[-3])
    for name in ("q", "k", "v"):
        rule = "must lie at multiples of 16 bytes, its rows apart"
        check(_can_map(getattr(a, name)), name, rule, getattr(a, name).stride())
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
    check(width in BACKWARD_HEAD_DIMS, "q", "must have head_dim 64 or 128", width)
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


def _can_map(t: Tensor) -> bool:
    strides = (s for s, extent in zip(t.stride()[:-1], t.shape[:-1], strict=True) if extent > 1)
    return t.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides)
