"""Samples and malformed calls of topk_partition."""

from __future__ import annotations

from typing import Any

import torch

from .._edits import set_argument, set_options
from ..registry import Malformed, Sample


def _sample(
    batch: int, tokens: int, k: int, *, hostile: bool = False, invalid: float = 0, **options: Any
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        scores = torch.randn(batch, tokens, generator=g)
        if hostile:
            scores = (2 * scores).round()
            scores[0, ::3] = float("nan")
            scores[-1, 1::2] = float("-inf")
            scores[-1, 4:7] = float("inf")
        given = dict(options)
        if invalid:
            given["valid"] = torch.rand(batch, tokens, generator=g) >= invalid
        return (scores.to(dtype), k), given

    return make


def _ragged(batch: int, tokens: int, most: int | None, **options: Any) -> Any:
    """A tensor k: 0 or the number of protected tokens, the maximum, and values between."""
    uniform = _sample(batch, tokens, 0, hostile=True, invalid=0.3, max_k=most, **options)
    least = sum(options.get(name, 0) for name in ("protect_first", "protect_last"))

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (scores, _), given = uniform(dtype, g)
        end = tokens if most is None else most
        k = torch.randint(least, end + 1, (batch,), generator=g, dtype=torch.int32)
        k[0], k[1] = least, end
        return (scores, k), given

    return make


def _every(*edits: Any) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        for one in edits:
            one(args, kwargs)

    return edit


SAMPLES = (
    Sample(
        "invalid and protected",
        _sample(3, 197, 60, invalid=0.8, protect_first=1, protect_last=4),
    ),
    Sample("of each row", _ragged(4, 70, 30, protect_first=1, protect_last=1)),
    Sample("not finite", _sample(2, 50, 30, hostile=True, order="index")),
    Sample("smallest", _sample(3, 70, 20, hostile=True, largest=False)),
    Sample("all by score", _sample(2, 33, 33, hostile=True)),
    Sample("of each row, by index", _ragged(3, 41, None, order="index")),
    Sample("none", _sample(2, 9, 0, order="index")),
    Sample("no tokens", _sample(2, 0, 0)),
)


MALFORMED = (
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
        "max_k: goes with a tensor k alone; got 60",
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
