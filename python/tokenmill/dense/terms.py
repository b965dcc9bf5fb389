"""The score_mod (from q.k to the weights) of operators with a score map: lowers the arguments of
public functions to the schema's.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .._check import (
    as_int,
    as_number,
    check,
    check_device_of_q,
    check_last_contiguous,
    check_tensor,
    check_text,
    check_wide,
    fail,
)
from .._lowering import widen

Kind = Literal["softmax", "sigmoid", "relu", "elu1", "linear", "taylor2"]
Normalize: TypeAlias = Literal["sum", "count"] | None
ScoreBias: TypeAlias = float | Literal["neg_log_n"] | Tensor | None
KINDS = ("softmax", "sigmoid", "relu", "elu1", "linear", "taylor2")
NO_WINDOW = (-1, -1)


def as_window(op: str, window: Any) -> tuple[int, int]:
    # torch 2.10 does not trace `is` between tuples.
    if not torch.compiler.is_compiling() and window is NO_WINDOW:
        return NO_WINDOW
    rule = "must be two ints (left, right)"
    if not (isinstance(window, tuple | list) and len(window) == 2):
        fail(op, "window", rule, window)
    return as_int(op, "window", window[0], rule), as_int(op, "window", window[1], rule)


def lower_score_bias(
    op: str, score_bias: float | str | Tensor | None, q: Tensor
) -> tuple[Tensor | None, float, bool]:
    """The bias as a tensor, a number, and whether to subtract the log of the number of keys."""
    if score_bias is None:
        return None, 0.0, False
    if isinstance(score_bias, Tensor):
        check_tensor(op, "score_bias", score_bias)
        return widen(score_bias, q), 0.0, False
    if isinstance(score_bias, str) and score_bias == "neg_log_n":
        return None, 0.0, True
    rule = "must be a number, 'neg_log_n' or a tensor"
    return None, as_number(op, "score_bias", score_bias, rule), False


def lower_normalize(op: str, normalize: str | None) -> str:
    if normalize is None:
        return "none"
    check_text(op, "normalize", normalize)
    return normalize


def has_row_statistic(kind: str, normalize: str) -> bool:
    """Whether there is a second result: the lse of softmax, the sums or counts of normalize."""
    return kind == "softmax" or normalize != "none"


def row_statistic_like(q: Tensor, kind: str, normalize: str) -> Tensor:
    """An empty row statistic: [B, H, Sq], packed [H, T]; of size 0 if there is none."""
    shape: tuple[int, ...] = (0,)
    if has_row_statistic(kind, normalize):
        shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return q.new_empty(shape, dtype=torch.float32)


def check_return_lse(op: str, kind: str, normalize: str) -> None:
    ok = kind == "softmax" or normalize == "sum" or kind not in KINDS
    check(ok, op, "return_lse", "needs kind 'softmax' or normalize 'sum', not", kind)


def check_small(op: str, name: str, t: Tensor, q: Tensor) -> None:
    check_wide(op, name, t, q)
    check_last_contiguous(op, name, t)
    check_device_of_q(op, name, t, q)


def share_of(part: Tensor, whole: Tensor) -> Tensor:
    """Share [B, S, H, 1] of a part of the keys in the weights of a row, from the lse [B, H, S] of
    the part and of all keys; 0 where there are none.
    """
    none = whole == -torch.inf
    share = (part - torch.where(none, 0.0, whole)).exp()
    return share.transpose(1, 2)[..., None]
