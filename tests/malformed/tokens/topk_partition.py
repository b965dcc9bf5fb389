"""Malformed calls of topk_partition."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, set_argument, set_options


def _every(*edits: Any) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        for one in edits:
            one(args, kwargs)

    return edit


CALLS = (
    Malformed(
        "rank",
        "scores: must have 2 dimensions [B, N]; got 1",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "dtype",
        "scores: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "layout",
        "scores: must have a contiguous last dimension",
        set_argument(0, lambda t: t.t()),
    ),
    Malformed("wide k", "k: must be 0 to N, 197; got 198", set_argument(1, lambda k: 198)),
    Malformed("k", "k: must be 0 to N, 197; got -1", set_argument(1, lambda k: -1)),
    Malformed(
        "max_k beside a number",
        "max_k: requires a tensor k; got 60",
        set_options(max_k=60),
    ),
    Malformed(
        "shape of k",
        "k: must have shape [3]; got [2]",
        set_argument(1, lambda k: torch.tensor([5, 6])),
    ),
    Malformed(
        "dtype of k",
        "k: must be int32; got float32",
        set_argument(1, lambda k: torch.ones(3)),
    ),
    Malformed(
        "max_k",
        "max_k: must be 0 to N, 197; got 198",
        _every(set_argument(1, lambda k: torch.tensor([5] * 3)), set_options(max_k=198)),
    ),
    Malformed(
        "k of a row",
        "k: must be 5 to 60; got 61",
        _every(set_argument(1, lambda k: torch.tensor([60, 5, 61])), set_options(max_k=60)),
        values=True,
    ),
    Malformed(
        "k of a row below what is protected",
        "k: must be 5 to 197; got 4",
        set_argument(1, lambda k: torch.tensor([5, 4, 9])),
        values=True,
    ),
    Malformed(
        "order",
        "order: must be 'score' or 'index'; got 'value'",
        set_options(order="value"),
    ),
    Malformed(
        "shape of valid",
        "valid: must have shape [3, 197]; got [3, 196]",
        set_options(valid=torch.ones(3, 196, dtype=torch.bool)),
    ),
    Malformed(
        "dtype of valid",
        "valid: must be bool; got float32",
        set_options(valid=torch.ones(3, 197)),
    ),
    Malformed(
        "negative protection",
        "protect_first: must not be negative; got -1",
        set_options(protect_first=-1),
    ),
    Malformed(
        "protection",
        "protect_last: must leave protect_first + protect_last <= k, 60, with "
        "protect_first 40; got 21",
        set_options(protect_first=40, protect_last=21),
    ),
)
