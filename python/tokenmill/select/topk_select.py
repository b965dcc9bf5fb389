"""topk_select: the positions of the k largest scores of each row, exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from .._check import (
    check,
)
from .._lowering import take_options
from .._other_names import answered_by
from ..reference.select import topk_select as reference
from ..registry import OpSpec, Sharding, register_op

OP = "topk_select"
MAX_K = 65536


def _run(scores: Tensor, k: int, **given: Any) -> tuple[Tensor, ...]:
    _, backend = take_options(topk_select, given)
    used = 3 if given.get("return_values") is True else 2
    if given.get("block_table") is None:
        return call(SPEC, (scores, k), given, backend, used=used)[:used]
    *results, physical = call(SPEC, (scores, k), given, backend)
    return (*results[:used], physical)


@answered_by(_run)
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
    previous: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""The k largest scores of each row, as positions.

    Row r is searched in the columns ``row_starts[r]`` to ``row_starts[r] + lengths[r] - 1``, and
    positions are relative to ``row_starts[r]``. NaN and -inf are never selected, so a row may have
    fewer than k. The result is exact and does not depend on threads, runs or backend.

    Args:
        scores: ``[R, n]`` float16, bfloat16 or float32 (float64 on the reference), any strides with
            a contiguous last dimension, n < 2^31.
        k: number of positions per row, 1 to 65536; it may exceed n.
        lengths: ``[R]`` int32, columns to search; clamped to the columns, negative = none.
            None: up to the last column.
        row_starts: ``[R]`` int32, 0 to n. None: 0.
        tie: which of equal scores goes first, "low" or "high" positions. 0 and -0 are equal.
        order: order of the result, "index" (ascending positions) or "score" (descending; equal
            scores as in tie; forced positions with NaN or -inf come last).
        force_first: number of first positions of the row that are taken whatever their score, even
            NaN, and count among the k (attention sinks).
        force_last: number of last positions, likewise (recent keys); force_first + force_last <= k.
        block_table: ``[B, P]`` int32 page numbers: also returns the rows of the positions in a
            paged cache, ``block_table[b, i // page_size] * page_size + i % page_size``.
        page_size: positions per page, a power of two.
        row_to_batch: ``[R]`` int32, the row of block_table for each row. None: its own, B = R.
        return_values: also return the scores.
        previous: ``[R, K]`` int32 with K >= 1, positions that were selected before in similar rows,
            in any order (a hint that never changes the result; invalid positions are skipped). The
            CPU estimates the k-th score from it, which pays if most positions are right; other
            backends ignore it.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (indices, counts[, values][, physical]): ``[R, k]`` int32 with -1 after the last, ``[R]``
        int32, ``[R, k]`` in the dtype of scores with -inf after the last, and ``[R, k]`` int32
        aligned with indices, -1 where a page is not in the table or negative. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: one or two passes over the scores and O(k log k) for order="score"; O(k) extra
    memory, on CUDA 8 bytes for each score of up to 131072 columns where a row takes several CTAs.

    Paper: exact selection as required by TokenSelect (Wu et al. 2024, section 4.2), TidalDecode
    (Yang et al. 2024, section 3) and Quest (Tang et al. 2024, section 3.3).

    Example:
        >>> import torch, tokenmill as tm
        >>> scores = torch.tensor([[0.1, 0.9, float("nan"), 0.9, 0.5]])
        >>> tm.topk_select(scores, 2)[0].tolist()
        [[1, 3]]
        >>> indices, counts = tm.topk_select(scores, 6, force_first=1)
        >>> indices.tolist(), counts.tolist()
        ([[0, 1, 3, 4, -1, -1]], [4])
    """
    raise NotImplementedError


def _check_values(a: Any) -> None:
    columns = a.scores.shape[1]
    if a.row_starts is not None:
        for start in a.row_starts.tolist():
            rule = f"must be 0 to the number of columns, {columns}"
            check(0 <= start <= columns, OP, "row_starts", rule, start)
    if a.row_to_batch is not None and a.block_table is not None:
        rows = a.block_table.shape[0]
        for batch in a.row_to_batch.tolist():
            rule = f"must be below the number of rows of block_table, {rows}"
            check(0 <= batch < rows, OP, "row_to_batch", rule, batch)


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = a.scores.shape[0]
    return (
        a.scores.new_empty((rows, a.k), dtype=torch.int32),
        a.scores.new_empty((rows,), dtype=torch.int32),
        a.scores.new_empty((rows, a.k) if a.return_values else (0,)),
        a.scores.new_empty((0,) if a.block_table is None else (rows, a.k), dtype=torch.int32),
    )


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        check_values=_check_values,
        triton="select.topk_select:topk_select",
    )
)
SPEC = register_op(
    OpSpec(
        function=topk_select,
        reference=reference.topk_select,
        forward=FORWARD,
        sharding=Sharding(
            {
                "scores": "r.",
                "lengths row_starts row_to_batch": "r",
                "block_table previous": "r.",
                "block_table@row_to_batch": "..",
            },
            ("r.", "r", "r.", "r."),
        ),
        paper="TokenSelect (Wu et al. 2024), TidalDecode (Yang et al. 2024)",
        flops=lambda a: 1.0 * a.scores.numel(),
    )
)
