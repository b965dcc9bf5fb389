"""Which calls of attention the kernels of compute capability 9.0 take: launch_sm90.h and
launch_backward_sm90.h of csrc/dense/attention have the same rules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._sm90 import Rules, float32, most_tiles
from .attention_rules import Arguments

HEAD_DIMS = (64, 96, 128, 192, 256)
BACKWARD_HEAD_DIMS = (64, 128)
MOST_BACKWARD_TILES = 2**31 - 1


def unsupported_sm90(*lowered: Any, out: Tensor | None = None) -> list[str]:
    """Why the forward does not take a call."""
    a = Arguments(*lowered)
    rules = _rules_of_both_passes(a, HEAD_DIMS)
    rules.check_scale(a)
    rules.check_tiles(a.q, a.cu_seqlens_q)
    if out is not None:
        rules.check_layout("out", out)
    return rules.broken


def unsupported_sm90_backward(*lowered: Any) -> list[str]:
    """Why the backward does not take the gradient of a call. That of `out` must lie as q does."""
    a = Arguments(*lowered)
    rules = _rules_of_both_passes(a, BACKWARD_HEAD_DIMS)
    if float32(a.softcap) > 0:
        rules.check_scale(a)
        summed = a.kind == "sigmoid" and a.score_bias is not None and a.score_bias.requires_grad
        rule = "must not require a gradient with a softcap"
        rules.check(not summed, "score_bias", rule, "a tensor that does")
    rows = 128 if a.q.shape[-1] <= 64 else 64
    tiles = most_tiles(a.q, a.cu_seqlens_q, rows)
    rule = f"must have fewer than 2^31 tiles of {rows} rows"
    rules.check(tiles <= MOST_BACKWARD_TILES, "q", rule, tiles)
    return rules.broken


def _rules_of_both_passes(a: Any, head_dims: tuple[int, ...]) -> Rules:
    rules = Rules()
    check = rules.check
    rules.check_heads(a.q, a.v, head_dims)
    check(a.kind in ("softmax", "sigmoid"), "kind", "must be 'softmax' or 'sigmoid'", a.kind)
    check(a.normalize == "none", "normalize", "must be 'none'", a.normalize)
    for name in ("mask_ranges", "mask_q_spans", "bias", "alibi_slopes"):
        check(getattr(a, name) is None, name, "must be None", "a tensor")
    rules.check_tokens(a.q, a.k, a.cu_seqlens_q)
    for name in ("q", "k", "v"):
        rules.check_layout(name, getattr(a, name))
    return rules
