"""topk_select: the positions of the k largest scores of each row, exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..check import (
    as_int,
    check,
    check_bool,
    check_device_of,
    check_dtype,
    check_last_contiguous,
    check_tensor,
    check_text,
    fail,
    is_power_of_two,
)
from ..dispatch import call
from ..library import TorchOp, register
from ..reference.select import topk_select as reference
from ..registry import Malformed, OpSpec, Sample, register_op
from .rules import check_per_request

OP = "topk_select"
MAX_K = 65536


def topk_select(
    scores: Tensor,
    k: int,
    *,
    lengths: Tensor | None = None,
    row_starts: Tensor | None = None,
    tie: str = "low",
    order: str = "index",
    force_first: int = 0,
    force_last: int = 0,
    block_table: Tensor | None = None,
    page_size: int = 1,
    row_to_batch: Tensor | None = None,
    return_values: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""The k largest scores of each row, as positions.

    Row r is searched in the columns ``row_starts[r]`` to ``row_starts[r] + lengths[r] - 1``, and
    positions count from ``row_starts[r]``. NaN and -inf are never selected, so a row may give fewer
    than k. The result is exact and does not depend on threads, runs or backend.

    Args:
        scores: ``[R, n]`` float16, bfloat16 or float32 (float64 on the reference), any strides with
            a contiguous last dimension, n < 2^31.
        k: positions wanted of each row, 1 to 65536; more than n is allowed.
        lengths: ``[R]`` int32, columns to search; clamped to the columns, negative = none.
            None: up to the last column.
        row_starts: ``[R]`` int32, 0 to n. None: 0.
        tie: which of equal scores goes first, "low" or "high" positions. 0 and -0 are equal.
        order: of the result, "index" (ascending positions) or "score" (descending; equal ones as in
            tie; forced ones that are NaN or -inf come last).
        force_first: so many first positions of the row are taken whatever their score, even NaN,
            and count among the k (attention sinks).
        force_last: so many last positions likewise (recent keys); force_first + force_last <= k.
        block_table: ``[B, P]`` int32 numbers of pages: also gives the rows of positions in a paged
            cache, ``block_table[b, i // page_size] * page_size + i % page_size``.
        page_size: positions of a page, a power of two.
        row_to_batch: ``[R]`` int32, the row of block_table for each row. None: its own, B = R.
        return_values: also give the scores.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (indices, counts[, values][, physical]): ``[R, k]`` int32 with -1 after the last, ``[R]``
        int32, ``[R, k]`` in the dtype of scores with -inf after the last, and ``[R, k]`` int32
        beside indices, -1 where a page is not in the table or negative. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: one or two passes over the scores and O(k log k) for order="score"; O(k) extra
    memory.

    Paper: exact selection as TokenSelect (Wu et al. 2024, section 4.2), TidalDecode (Yang et al.
    2024, section 3) and Quest (Tang et al. 2024, section 3.3) need it.

    Example:
        >>> import torch, tokenmill as tm
        >>> scores = torch.tensor([[0.1, 0.9, float("nan"), 0.9, 0.5]])
        >>> tm.topk_select(scores, 2)[0].tolist()
        [[1, 3]]
        >>> indices, counts = tm.topk_select(scores, 6, force_first=1)
        >>> indices.tolist(), counts.tolist()
        ([[0, 1, 3, 4, -1, -1]], [4])
    """
    lowered = lower(
        scores, k, lengths=lengths, row_starts=row_starts, tie=tie, order=order,
        force_first=force_first, force_last=force_last, block_table=block_table,
        page_size=page_size, row_to_batch=row_to_batch, return_values=return_values,
    )  # fmt: skip
    indices, counts, values, physical = call(SPEC, lowered, backend)
    found: tuple[Tensor, ...] = (indices, counts)
    if return_values:
        found += (values,)
    return found if block_table is None else (*found, physical)


def lower(
    scores: Tensor,
    k: int,
    *,
    lengths: Tensor | None = None,
    row_starts: Tensor | None = None,
    tie: str = "low",
    order: str = "index",
    force_first: int = 0,
    force_last: int = 0,
    block_table: Tensor | None = None,
    page_size: int = 1,
    row_to_batch: Tensor | None = None,
    return_values: bool = False,
) -> tuple[Any, ...]:
    check_tensor(OP, "scores", scores)
    for name, t in (("lengths", lengths), ("row_starts", row_starts), ("block_table", block_table),
                    ("row_to_batch", row_to_batch)):  # fmt: skip
        check_tensor(OP, name, t, optional=True)
    k, page_size = as_int(OP, "k", k), as_int(OP, "page_size", page_size)
    force_first = as_int(OP, "force_first", force_first)
    force_last = as_int(OP, "force_last", force_last)
    for name, text in (("tie", tie), ("order", order)):
        check_text(OP, name, text)
    check_bool(OP, "return_values", return_values)
    return (
        scores, k, lengths, row_starts, tie, order, force_first, force_last, block_table, page_size,
        row_to_batch, return_values,
    )  # fmt: skip


def _check(
    scores: Tensor,
    k: int,
    lengths: Tensor | None,
    row_starts: Tensor | None,
    tie: str,
    order: str,
    force_first: int,
    force_last: int,
    block_table: Tensor | None,
    page_size: int,
    row_to_batch: Tensor | None,
    return_values: bool,
    *,
    float64: bool = False,
) -> None:
    check(scores.dim() == 2, OP, "scores", "must have 2 dimensions [R, n]", scores.dim())
    check_dtype(OP, "scores", scores, float64=float64)
    check_last_contiguous(OP, "scores", scores)
    columns = scores.shape[1]
    check(columns < 2**31, OP, "scores", "must have fewer than 2^31 columns", columns)
    check(1 <= k <= MAX_K, OP, "k", f"must be 1 to {MAX_K}", k)
    check(tie in ("low", "high"), OP, "tie", "must be 'low' or 'high'", tie)
    check(order in ("index", "score"), OP, "order", "must be 'index' or 'score'", order)
    check(force_first >= 0, OP, "force_first", "must not be negative", force_first)
    check(force_last >= 0, OP, "force_last", "must not be negative", force_last)
    if not force_first + force_last <= k:
        rule = f"must leave force_first + force_last <= k, {k}, with force_first {force_first}"
        fail(OP, "force_last", rule, force_last)
    rows = scores.shape[0]
    check_per_request(OP, "lengths", lengths, rows, "scores", scores)
    check_per_request(OP, "row_starts", row_starts, rows, "scores", scores)
    power = page_size <= 2**30 and is_power_of_two(page_size)
    check(power, OP, "page_size", "must be a power of two", page_size)
    if block_table is not None:
        _check_block_table(block_table, scores, row_to_batch)
    elif row_to_batch is not None:
        fail(OP, "row_to_batch", "goes with block_table alone", row_to_batch.shape)
    check_per_request(OP, "row_to_batch", row_to_batch, rows, "scores", scores)


def _check_block_table(table: Tensor, scores: Tensor, row_to_batch: Tensor | None) -> None:
    check(table.dim() == 2, OP, "block_table", "must have 2 dimensions [B, P]", table.dim())
    check(table.dtype == torch.int32, OP, "block_table", "must be int32", table.dtype)
    check_last_contiguous(OP, "block_table", table)
    check_device_of(OP, "block_table", table, "scores", scores)
    if row_to_batch is None and table.shape[0] != scores.shape[0]:
        rule = f"must have a row for each row of scores, {scores.shape[0]}, without row_to_batch"
        fail(OP, "block_table", rule, table.shape[0])


def _check_values(
    scores: Tensor,
    k: int,
    lengths: Tensor | None,
    row_starts: Tensor | None,
    tie: str,
    order: str,
    force_first: int,
    force_last: int,
    block_table: Tensor | None,
    page_size: int,
    row_to_batch: Tensor | None,
    return_values: bool,
) -> None:
    columns = scores.shape[1]
    if row_starts is not None:
        for start in row_starts.tolist():
            rule = f"must be 0 to the number of columns, {columns}"
            check(0 <= start <= columns, OP, "row_starts", rule, start)
    if row_to_batch is not None and block_table is not None:
        rows = block_table.shape[0]
        for batch in row_to_batch.tolist():
            rule = f"must be below the number of rows of block_table, {rows}"
            check(0 <= batch < rows, OP, "row_to_batch", rule, batch)


def _fake(
    scores: Tensor,
    k: int,
    lengths: Tensor | None,
    row_starts: Tensor | None,
    tie: str,
    order: str,
    force_first: int,
    force_last: int,
    block_table: Tensor | None,
    page_size: int,
    row_to_batch: Tensor | None,
    return_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = scores.shape[0]
    return (
        scores.new_empty((rows, k), dtype=torch.int32),
        scores.new_empty((rows,), dtype=torch.int32),
        scores.new_empty((rows, k) if return_values else (0,)),
        scores.new_empty((0,) if block_table is None else (rows, k), dtype=torch.int32),
    )


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


FORWARD = register(
    TorchOp(
        OP,
        check=_check,
        fake=_fake,
        check_values=_check_values,
        triton="select.topk_select:topk_select",
    )
)
SPEC = register_op(
    OpSpec(
        name=OP,
        family="select",
        function=topk_select,
        lower=lower,
        reference=reference.topk_select,
        plain=reference.topk_select,  # exact in any dtype
        forward=FORWARD,
        backward=None,
        samples=(
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
                _sample(
                    4, 64, 20, _hostile, force_first=4, force_last=9, lengths=_ints(64, 3, 10, 30)
                ),
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
            Sample("more than there are", _sample(2, 5, 9, return_values=True)),
            Sample("one", _sample(3, 40, 1)),
            Sample("no columns", _sample(2, 0, 3, return_values=True)),
            Sample("no rows", _sample(0, 12, 3)),
        ),
        malformed=(
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
            Malformed(
                "tie", "tie: must be 'low' or 'high'; got 'any'", lambda a, k: k.update(tie="any")
            ),
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
                "force_last: must leave force_first + force_last <= k, 17, with force_first 9; "
                "got 9",
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
                "block_table: must have a row for each row of scores, 4, without row_to_batch; "
                "got 3",
                lambda a, k: k.update(block_table=torch.zeros(3, 2, dtype=torch.int32)),
            ),
            Malformed(
                "row_to_batch alone",
                "row_to_batch: goes with block_table alone; got [4]",
                lambda a, k: k.update(row_to_batch=torch.zeros(4, dtype=torch.int32)),
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
        ),
        differentiable=(),
        paper="TokenSelect (Wu et al. 2024), TidalDecode (Yang et al. 2024)",
        flops=lambda scores, *rest: 1.0 * scores.numel(),
    )
)
