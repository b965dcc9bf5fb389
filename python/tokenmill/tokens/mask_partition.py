"""mask_partition: packs the tokens selected by a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from .._check import check
from ..reference.tokens import mask_partition as reference
from ..registry import OpSpec, register_op

OP = "mask_partition"


def mask_partition(
    mask: Tensor, *, max_total: int | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Packs the tokens selected by a mask: their source indices, and the packed position of each
    token.

    Args:
        mask: bool ``[B, N]``, any strides with a contiguous last dimension, B·N < 2^31.
        max_total: size of indices, at least the number of selected tokens (a GPU drops later ones).
            None: B·N, enough for any mask.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (indices, cu_seqlens, inverse): int32 ``[max_total]``, b·N + n of the selected tokens,
        ascending, with -1 after the last; int32 ``[B + 1]``, row b has the positions
        ``cu_seqlens[b]`` to ``cu_seqlens[b + 1] - 1``; int32 ``[B, N]``, the packed position of
        each token, -1 if it is not selected. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: O(B·N), one pass over the mask and one write pass.

    Paper: DToP (Tang et al. 2023, section 3.3), tokens that have not exited early.

    Example:
        >>> import torch, tokenmill as tm
        >>> mask = torch.tensor([[True, False, True], [False, False, True]])
        >>> indices, cu_seqlens, inverse = tm.mask_partition(mask, max_total=4)
        >>> indices.tolist(), cu_seqlens.tolist(), inverse.tolist()
        ([0, 2, 5, -1], [0, 2, 3], [[0, -1, 1], [-1, -1, 2]])
    """
    indices, cu_seqlens, inverse = call(SPEC, (mask,), {"max_total": max_total}, backend)
    return indices, cu_seqlens, inverse


def _check_values(a: Any) -> None:
    if a.max_total is not None:
        taken = int(a.mask.sum())
        rule = f"must be at least the number of tokens taken, {taken}"
        check(taken <= a.max_total, OP, "max_total", rule, a.max_total)


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = a.mask.shape
    size = batch * tokens if a.max_total is None else a.max_total
    return (
        a.mask.new_empty((size,), dtype=torch.int32),
        a.mask.new_empty((batch + 1,), dtype=torch.int32),
        a.mask.new_empty((batch, tokens), dtype=torch.int32),
    )


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        check_values=_check_values,
        triton="tokens.mask_partition:mask_partition",
    )
)
SPEC = register_op(
    OpSpec(
        function=mask_partition,
        reference=reference.mask_partition,
        forward=FORWARD,
        sharding="places count through all sequences",
        paper="DToP (Tang et al. 2023)",
        flops=lambda a: 1.0 * a.mask.numel(),
    )
)
