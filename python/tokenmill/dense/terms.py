"""What lies between q.k and the weights, for operators with a score map: how the arguments of the
public functions become those of the schema, and what they must keep to. csrc/dense/terms.h has the
same rules in the same order and words."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..check import check, check_device_of_q, check_last_contiguous, fail
from ..lowering import widen

Kind = Literal["softmax", "sigmoid"]
ScoreBias: TypeAlias = float | Literal["neg_log_n"] | Tensor | None
KINDS = ("softmax", "sigmoid")


def check_number(op: str, name: str, x: Any) -> None:
    if not isinstance(x, int | float):
        fail(op, name, "must be a number", x)


def check_window(op: str, window: Any) -> None:
    pair = isinstance(window, tuple | list) and len(window) == 2
    if not (pair and type(window[0]) is int and type(window[1]) is int):
        fail(op, "window", "must be two ints (left, right)", window)


def lower_score_bias(
    op: str, score_bias: float | str | Tensor | None, q: Tensor
) -> tuple[Tensor | None, float, bool]:
    """As a tensor, a number and whether to subtract the logarithm of the number of keys."""
    if isinstance(score_bias, Tensor):
        return widen(score_bias, q), 0.0, False
    if score_bias == "neg_log_n" or score_bias is None:
        return None, 0.0, score_bias is not None
    if not isinstance(score_bias, int | float):
        fail(op, "score_bias", "must be a number, 'neg_log_n' or a tensor", score_bias)
    return None, float(score_bias), False


def check_kind(op: str, kind: str) -> None:
    check(kind in KINDS, op, "kind", "must be 'softmax' or 'sigmoid'", kind)


def check_scale(op: str, scale: float, softcap: float) -> None:
    check(math.isfinite(scale), op, "scale", "must be finite", scale)
    ok = math.isfinite(softcap) and softcap >= 0
    check(ok, op, "softcap", "must be finite and not negative (0 = off)", softcap)


def check_terms(
    op: str,
    q: Tensor,
    batch: int,
    kind: str,
    score_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
) -> None:
    heads = q.shape[-2]
    for name, t in (("score_bias", score_bias), ("alibi_slopes", alibi_slopes)):
        if t is None:
            continue
        if list(t.shape) != [heads] and list(t.shape) != [batch, heads]:
            fail(op, name, f"must have shape [{heads}] or [{batch}, {heads}]", t.shape)
        check_small(op, name, t, q)
    if sink is not None:
        check(kind == "softmax", op, "sink", "needs kind 'softmax', not", kind)
        if list(sink.shape) != [heads]:
            fail(op, "sink", f"must have shape [{heads}]", sink.shape)
        check_small(op, "sink", sink, q)


def check_small(op: str, name: str, t: Tensor, q: Tensor) -> None:
    wide = torch.promote_types(q.dtype, torch.float32)
    check(t.dtype == wide, op, name, "must be float32", t.dtype)
    check_last_contiguous(op, name, t)
    check_device_of_q(op, name, t, q)
