"""Samples and malformed calls of topk_select."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Malformed, Sample


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


MALFORMED = (
    Malformed(
        "rank",
        "scores: must have 2 dimensions [R, n]; got 1",
        lambda a, k: a.__setitem__(0, a[0][0]),
    ),
    Malformed(
        "dtype",
        "scores: must be float16, bfloat16 or float32; got int32",
        lambda a, k: a.__setitem__(0, a[0].int()),
    ),
    Malformed(
        "layout",
        "scores: must have a contiguous last dimension",
        lambda a, k: a.__setitem__(0, a[0].t()),
    ),
    Malformed("k", "k: must be 1 to 65536; got 0", lambda a, k: a.__setitem__(1, 0)),
    Malformed("wide k", "k: must be 1 to 65536", lambda a, k: a.__setitem__(1, 65537)),
    Malformed("tie", "tie: must be 'low' or 'high'; got 'any'", lambda a, k: k.update(tie="any")),
    Malformed(
        "order",
        "order: must be 'index' or 'score'; got 'value'",
        lambda a, k: k.update(order="value"),
    ),
    Malformed(
        "negative force",
        "force_first: must not be negative; got -1",
        lambda a, k: k.update(force_first=-1),
    ),
    Malformed(
        "force",
        "force_last: must leave force_first + force_last <= k, 17, with force_first 9; got 9",
        lambda a, k: k.update(force_first=9, force_last=9),
    ),
    Malformed(
        "lengths",
        "lengths: must have shape [4]; got [3]",
        lambda a, k: k.update(lengths=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "dtype of lengths",
        "lengths: must be int32; got int64",
        lambda a, k: k.update(lengths=torch.zeros(4, dtype=torch.int64)),
    ),
    Malformed(
        "page size",
        "page_size: must be a power of two; got 12",
        lambda a, k: k.update(page_size=12),
    ),
    Malformed(
        "rows of the block table",
        "block_table: must have a row for each row of scores, 4, without row_to_batch; got 3",
        lambda a, k: k.update(block_table=torch.zeros(3, 2, dtype=torch.int32)),
    ),
    Malformed(
        "row_to_batch alone",
        "row_to_batch: goes with block_table alone; got [4]",
        lambda a, k: k.update(row_to_batch=torch.zeros(4, dtype=torch.int32)),
    ),
    Malformed(
        "rank of previous",
        "previous: must have 2 dimensions [R, K]; got 1",
        lambda a, k: k.update(previous=torch.zeros(4, dtype=torch.int32)),
    ),
    Malformed(
        "dtype of previous",
        "previous: must be int32; got int64",
        lambda a, k: k.update(previous=torch.zeros(4, 17, dtype=torch.int64)),
    ),
    Malformed(
        "rows of previous",
        "previous: must have a row for each row of scores, 4; got 3",
        lambda a, k: k.update(previous=torch.zeros(3, 17, dtype=torch.int32)),
    ),
    Malformed(
        "no hints",
        "previous: must have a column; got 0",
        lambda a, k: k.update(previous=torch.zeros(4, 0, dtype=torch.int32)),
    ),
    Malformed(
        "layout of previous",
        "previous: must have a contiguous last dimension",
        lambda a, k: k.update(previous=torch.zeros(17, 4, dtype=torch.int32).t()),
    ),
    Malformed(
        "start",
        "row_starts: must be 0 to the number of columns, 300; got 301",
        lambda a, k: k.update(row_starts=torch.full((4,), 301, dtype=torch.int32)),
        values=True,
    ),
    Malformed(
        "batch",
        "row_to_batch: must be below the number of rows of block_table, 2; got 2",
        lambda a, k: k.update(
            block_table=torch.zeros(2, 2, dtype=torch.int32),
            row_to_batch=torch.full((4,), 2, dtype=torch.int32),
        ),
        values=True,
    ),
)
