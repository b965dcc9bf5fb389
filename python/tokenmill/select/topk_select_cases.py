"""Sample calls of topk_select."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Sample


def _sample(
    rows: int,
    columns: int,
    k: int,
    change: Any = None,
    **options: Any,
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        scores = torch.randn(rows, columns, generator=g)
        if change:
            scores = change(scores)
        given = {n: v(g) if callable(v) else v for n, v in options.items()}
        return (scores.to(dtype), k), given

    return make


def _hostile(scores: Tensor) -> Tensor:
    scores[0, ::3] = float("nan")
    scores[1, 1::2] = float("-inf")
    scores[2] = float("nan")
    scores[3, 4:9] = float("inf")
    return scores


def _ints(*values: int) -> Any:
    return lambda g: torch.tensor(values, dtype=torch.int32)


def _pages(batch: int, pages: int) -> Any:
    return lambda g: torch.randperm(batch * pages, generator=g).int().view(batch, pages)


def _hints(rows: int, hints: int, end: int) -> Any:
    """Numbers from -10 on, some of them invalid positions, others repeated."""
    return lambda g: torch.randint(-10, end, (rows, hints), generator=g, dtype=torch.int32)


SAMPLES = (
    Sample("plain", _sample(4, 300, 17)),
    Sample(
        "windows",
        _sample(
            5,
            100,
            20,
            lengths=_ints(100, 19, 0, -4, 500),
            row_starts=_ints(0, 50, 10, 0, 99),
        ),
    ),
    Sample("not finite", _sample(5, 70, 30, _hostile, return_values=True)),
    Sample("ties low", _sample(3, 200, 50, lambda s: s.round(), return_values=True)),
    Sample("ties high", _sample(3, 200, 50, lambda s: s.round(), tie="high")),
    Sample("all equal", _sample(2, 130, 7, lambda s: s * 0, tie="high", order="score")),
    Sample(
        "by score",
        _sample(3, 90, 40, lambda s: (3 * s).round(), order="score", return_values=True),
    ),
    Sample(
        "forced",
        _sample(4, 64, 20, _hostile, force_first=4, force_last=9, lengths=_ints(64, 3, 10, 30)),
    ),
    Sample(
        "forced by score",
        _sample(
            4,
            64,
            20,
            _hostile,
            force_first=4,
            force_last=9,
            order="score",
        ),
    ),
    Sample("paged", _sample(3, 96, 12, block_table=_pages(3, 6), page_size=16)),
    Sample(
        "short block table",
        _sample(
            4,
            96,
            50,
            block_table=_pages(2, 4),
            page_size=16,
            row_to_batch=_ints(1, 0, 1, 1),
        ),
    ),
    Sample("hinted", _sample(3, 400, 40, previous=_hints(3, 30, 400))),
    Sample(
        "hinted, not finite",
        _sample(5, 3000, 300, _hostile, previous=_hints(5, 500, 3100), force_first=2),
    ),
    Sample("more than there are", _sample(2, 5, 9, return_values=True)),
    Sample("one", _sample(3, 40, 1)),
    Sample("no columns", _sample(2, 0, 3, return_values=True)),
    Sample("no rows", _sample(0, 12, 3)),
)
