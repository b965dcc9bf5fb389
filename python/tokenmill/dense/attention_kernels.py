"""Which calls of attention the kernels of compute capability 9.0 take: launch_sm90.h and
launch_backward_sm90.h of csrc/dense/attention have the same rules."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .attention_rules import Arguments

LEAST_QUERIES = 32  # of a tile of 64 rows, and of one of 64 or 128
HEAD_DIMS = (64, 96, 128, 192, 256)
BACKWARD_HEAD_DIMS = (64, 128)
MOST_TILES = 2**30
MOST_BACKWARD_TILES = 2**31 - 1


class _Rules:
    """Those that a call breaks: "argument: rule; got value" each."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def check(self, holds: bool, argument: str, rule: str, value: object) -> None:
        if not holds:
            self.broken.append(f"{argument}: {rule}; got {value}")

    def check_both_passes(self, a: Any, head_dims: tuple[int, ...]) -> None:
        tokens, columns = a.q.shape[-3], a.q.shape[-1]
        check = self.check
        check(a.q.dtype != torch.float32, "q", "must be float16 or bfloat16", a.q.dtype)
        rule = f"must have head_dim {', '.join(map(str, head_dims[:-1]))} or {head_dims[-1]}"
        check(columns in head_dims, "q", rule, columns)
        check(a.v.shape[-1] == columns, "v", "must have the head_dim of q", a.v.shape[-1])
        check(a.kind in ("softmax", "sigmoid"), "kind", "must be 'softmax' or 'sigmoid'", a.kind)
        check(a.normalize == "none", "normalize", "must be 'none'", a.normalize)
        for name in ("mask_ranges", "mask_q_spans", "bias", "alibi_slopes"):
            check(getattr(a, name) is None, name, "must be None", "a tensor")
        sequences = 1 if a.cu_seqlens_q is None else max(a.cu_seqlens_q.shape[0] - 1, 1)
        rule = f"must have {LEAST_QUERIES} tokens for each sequence"
        check(tokens >= LEAST_QUERIES * sequences, "q", rule, tokens)
        check(a.k.shape[-3] > 0, "k", "must have tokens", a.k.shape[-3])
        for name in ("q", "k", "v"):
            self.check_layout(name, getattr(a, name))

    def check_scale(self, a: Any) -> None:
        scale = _float32(a.q.shape[-1] ** -0.5 if a.scale is None else a.scale)
        self.check(scale >= 2**-126, "scale", "must be 2^-126 or more in float32", a.scale)
        softcap = _float32(a.softcap)
        capped = softcap <= 0 or (softcap < _float32(1e38) and scale >= 2**-64 * softcap)
        self.check(capped, "softcap", "must be below 1e38 and at most 2^64 scale", a.softcap)

    def check_layout(self, name: str, t: Tensor) -> None:
        past = t.data_ptr() % 16
        rule = "must start at a multiple of 16 bytes"
        self.check(past == 0, name, rule, f"{past} bytes behind one")
        rule = f"must have strides that are multiples of 8, of {t.shape[-1]} or more"
        self.check(past > 0 or _has_mapped_strides(t), name, rule, t.stride())


def unsupported_sm90(*lowered: Any, out: Tensor | None = None) -> list[str]:
    """Why the forward does not take a call."""
    a = Arguments(*lowered)
    rules = _Rules()
    rules.check_both_passes(a, HEAD_DIMS)
    rules.check_scale(a)
    tiles = _tiles(a, 64)
    rules.check(tiles <= MOST_TILES, "q", "must have at most 2^30 tiles of 64 rows", tiles)
    if out is not None:
        rules.check_layout("out", out)
    return rules.broken


def unsupported_sm90_backward(*lowered: Any) -> list[str]:
    """Why the backward does not take the gradient of a call. That of `out` must lie as q does."""
    a = Arguments(*lowered)
    rules = _Rules()
    rules.check_both_passes(a, BACKWARD_HEAD_DIMS)
    if _float32(a.softcap) > 0:
        rules.check_scale(a)
        summed = a.kind == "sigmoid" and a.score_bias is not None and a.score_bias.requires_grad
        rule = "must not require a gradient with a softcap"
        rules.check(not summed, "score_bias", rule, "a tensor that does")
    rows = 128 if a.q.shape[-1] <= 64 else 64
    tiles = _tiles(a, rows)
    rule = f"must have fewer than 2^31 tiles of {rows} rows"
    rules.check(tiles <= MOST_BACKWARD_TILES, "q", rule, tiles)
    return rules.broken


def _tiles(a: Any, rows: int) -> int:
    """A bound on those of `rows` queries of all heads."""
    tokens, heads = a.q.shape[-3:-1]
    if a.cu_seqlens_q is not None:
        return int(heads * (tokens // rows + a.cu_seqlens_q.shape[0]))
    return int(a.q.shape[0] * heads * -(-tokens // rows))


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def _has_mapped_strides(t: Tensor) -> bool:
    """Strides of extents of 1 do not matter, and a map has 40 bits for the others, in bytes."""
    strides = (s for s, extent in zip(t.stride()[:-1], t.shape[:-1], strict=True) if extent > 1)
    return all(t.shape[-1] <= s < 2**39 and s % 8 == 0 for s in strides)
