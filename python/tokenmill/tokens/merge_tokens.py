"""merge_tokens and unmerge_tokens: average tokens into fewer rows, and copy rows back to tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Never

from .. import registry
from .._check import as_int, check, check_tensor, fail, reads_values
from .._other_names import refuse, refuses_other_names
from ._rows import check_index_values, check_like, check_tokens
from .gather_tokens import gather_tokens
from .segment_reduce import segment_reduce

OP = "merge_tokens"


@refuses_other_names
def merge_tokens(
    x: Tensor,
    assign: Tensor,
    num_out: int,
    *,
    weight: Tensor | None = None,
    reduce: str = "mean",
    backend: str | None = None,
    **other: Never,
) -> tuple[Tensor, Tensor]:
    r"""Merges tokens into rows: row t of the result combines the tokens with ``assign == t``.

    With :math:`W_t = \sum_{i \to t} w_i`, the mean is :math:`y_t = \sum_{i \to t} w_i x_i / W_t`,
    and 0 where :math:`W_t = 0`. Passing the weight_sum of one merge as the weight of the next keeps
    the mean over all original tokens.

    One counting sort (:func:`transpose_block_list`) and one sum over its segments
    (:func:`segment_reduce`): deterministic, without atomic additions.

    Args:
        x: ``[B, N, C]`` or packed ``[N, C]``, float16, bfloat16 or float32 (float64 on the
            reference), any strides with a contiguous last dimension.
        assign: ``[B, N]`` or ``[N]`` int32 or int64, the row of each token, 0 to num_out - 1; -1
            drops it.
        num_out: number of rows of the result.
        weight: ``[B, N]`` or ``[N]``, weight of each token (its size); None: 1. Only for sum and
            mean.
        reduce: "mean", "sum", "amax", "amin", "first" or "last" (in the order of the tokens).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (y, weight_sum): ``[B, num_out, C]`` in the dtype of x and ``[B, num_out]`` float32, the sum
        of weights (without weight, the number of tokens). A row without tokens is 0. Differentiable
        in x and weight, but not in the choice.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads x once and writes y once; O(B (N + num_out)) extra memory.

    Paper: ToMe (Bolya et al. 2023), section 3: merging with tracked token sizes.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.tensor([[[1.0], [3.0], [10.0]]])
        >>> y, size = tm.merge_tokens(x, torch.tensor([[0, 0, 1]]), 2)
        >>> y.tolist(), size.tolist()
        ([[[2.0], [10.0]]], [[2.0, 1.0]])
        >>> tm.unmerge_tokens(y, torch.tensor([[0, 0, 1]])).tolist()
        [[[2.0], [2.0], [10.0]]]
    """
    if other:
        refuse(merge_tokens, other)
    for name, t in (("x", x), ("assign", assign)):
        check_tensor(OP, name, t)
    check_tensor(OP, "weight", weight, optional=True)
    num_out = as_int(OP, "num_out", num_out, minimum=0, maximum=2**30 - 1)
    check(x.dim() in (2, 3), OP, "x", "must have 3 dimensions [B, N, C] or 2 [N, C]", x.dim())
    if assign.shape != x.shape[:-1]:
        fail(OP, "assign", f"must have shape {list(x.shape[:-1])}", assign.shape)
    check(assign.dtype in (torch.int32, torch.int64), OP, "assign", "must be int32 or int64",
          assign.dtype)  # fmt: skip
    if reads_values(assign):
        check_index_values(OP, "assign", assign, num_out)
    if x.dim() == 2:
        y, total = merge_tokens(
            x[None], assign[None], num_out, weight=None if weight is None else weight[None],
            reduce=reduce, backend=backend,
        )  # fmt: skip
        return y[0], total[0]
    check_tokens(OP, "x", x, float64=True)
    if weight is not None:
        check(weight.is_floating_point(), OP, "weight", "must be of a floating type", weight.dtype)
        check_like(OP, "weight", weight, list(x.shape[:2]), weight.dtype, "x", x)
    lists = assign.to(torch.int32)[:, None, :, None]
    counts = lists.new_ones(lists.shape[:-1])
    # By its name: the operator belongs to a family that is built on this one.
    transpose_block_list = registry.get("transpose_block_list").function
    offsets, rows = transpose_block_list(lists, counts, num_out, backend=backend)
    y, total = segment_reduce(
        x, offsets[:, 0], perm=rows[:, 0], weight=weight, reduce=reduce, return_weight_sum=True,
        backend=backend,
    )  # fmt: skip
    return y, total


def unmerge_tokens(y: Tensor, assign: Tensor, *, backend: str | None = None) -> Tensor:
    """Copies to each token the row into which it was merged: the inverse of :func:`merge_tokens` if
    the merged tokens were equal.

    Args:
        y: ``[B, M, C]`` or packed ``[M, C]``.
        assign: ``[B, N]`` or ``[N]`` int32 or int64, the row of each token; -1 gives zeros.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        ``[B, N, C]`` in the dtype of y, differentiable in y; the same as :func:`gather_tokens`.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: one read of the rows and one write of the tokens.

    Paper: ToMe for Stable Diffusion (Bolya and Hoffman 2023), section 3.

    Example:
        >>> import torch, tokenmill as tm
        >>> tm.unmerge_tokens(torch.tensor([[5.0], [7.0]]), torch.tensor([1, 0, -1])).tolist()
        [[7.0], [5.0], [0.0]]
    """
    return gather_tokens(y, assign, backend=backend)
