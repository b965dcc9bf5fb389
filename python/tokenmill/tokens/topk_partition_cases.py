"""Sample calls of topk_partition."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


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


def _ragged(batch: int, tokens: int, maximum: int | None, **options: Any) -> Any:
    """A tensor k: 0 or the number of protected tokens, the maximum, and values between."""
    uniform = _sample(batch, tokens, 0, hostile=True, invalid=0.3, max_k=maximum, **options)
    minimum = sum(options.get(name, 0) for name in ("protect_first", "protect_last"))

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (scores, _), given = uniform(dtype, g)
        end = tokens if maximum is None else maximum
        k = torch.randint(minimum, end + 1, (batch,), generator=g, dtype=torch.int32)
        k[0], k[1] = minimum, end
        return (scores, k), given

    return make


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
