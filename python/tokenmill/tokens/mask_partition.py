"""mask_partition: packs the tokens selected by a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from .._check import as_int, check, check_last_contiguous, check_tensor
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
    indices, cu_seqlens, inverse = call(SPEC, lower(mask, max_total=max_total), backend)
    return indices, cu_seqlens, inverse


def lower(mask: Tensor, *, max_total: int | None = None) -> tuple[Any, ...]:
    check_tensor(OP, "mask", mask)
    if max_total is not None:
        max_total = as_int(OP, "max_total", max_total)
    return mask, max_total


# The rules of csrc/tokens/mask_partition/host.cpp, in the same order and words.
def _check(mask: Tensor, max_total: int | None, *, float64: bool = False) -> None:
    check(mask.dim() == 2, OP, "mask", "must have 2 dimensions [B, N]", mask.dim())
    check(mask.dtype == torch.bool, OP, "mask", "must be bool", mask.dtype)
    check_last_contiguous(OP, "mask", mask)
    tokens = mask.shape[0] * mask.shape[1]
    check(tokens < 2**31, OP, "mask", "must have fewer than 2^31 tokens in all", tokens)
    if max_total is not None:
        fits = 0 <= max_total < 2**31
        check(fits, OP, "max_total", "must be 0 to 2^31 - 1", max_total)


def _check_values(mask: Tensor, max_total: int | None) -> None:
    if max_total is not None:
        taken = int(mask.sum())
        rule = f"must be at least the number of tokens taken, {taken}"
        check(taken <= max_total, OP, "max_total", rule, max_total)


def _fake(mask: Tensor, max_total: int | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = mask.shape
    size = batch * tokens if max_total is None else max_total
    return (
        mask.new_empty((size,), dtype=torch.int32),
        mask.new_empty((batch + 1,), dtype=torch.int32),
        mask.new_empty((batch, tokens), dtype=torch.int32),
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
        name=OP,
        family="tokens",
        function=mask_partition,
        lower=lower,
        reference=reference.mask_partition,
        plain=reference.mask_partition,  # exact
        forward=FORWARD,
        backward=None,
        # Edits of the first sample.
        differentiable=(),
        sharding="places count through all sequences",
        paper="DToP (Tang et al. 2023)",
        flops=lambda mask, *rest: 1.0 * mask.numel(),
    )
)
