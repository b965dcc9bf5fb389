"""topk_partition: partitions the tokens of each row into the k best and the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.operator import TorchOp
from .._call.run import call
from .._check import as_int, check, check_tensor, fail
from ..reference.tokens import topk_partition as reference
from ..registry import OpSpec, Sharding, register_op
from ._rows import as_int32

OP = "topk_partition"


def topk_partition(
    scores: Tensor,
    k: int | Tensor,
    *,
    max_k: int | None = None,
    largest: bool = True,
    order: str = "score",
    valid: Tensor | None = None,
    protect_first: int = 0,
    protect_last: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Partitions the tokens of each row into the k best and the rest.

    The ranking is: protected tokens, by index; valid tokens by score, ties by index; valid tokens
    whose score is NaN or -inf (+inf if largest is False); invalid tokens. The result is exact and
    does not depend on threads, runs or backend.

    Args:
        scores: ``[B, N]`` float16, bfloat16 or float32 (float64 on the reference), any strides with
            a contiguous last dimension, N < 2^31. 0 and -0 are equal.
        k: number of tokens to keep per row, 0 to N. Or int32 or int64 ``[B]``: one number per row.
        max_k: maximum of a tensor k, which decides the shapes. None: N.
        largest: whether larger scores are better.
        order: order of the kept tokens, "score" (best first) or "index" (ascending).
        valid: bool ``[B, N]``. Invalid tokens come after all others. None: all are valid.
        protect_first: number of first tokens that are kept whatever their score, even if invalid
            (the class token).
        protect_last: number of last tokens, likewise; protect_first + protect_last <= each k.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (keep, rest): int32 ``[B, k]`` and ``[B, N - k]``; rest ascends. With a tensor k ``[B,
        max_k]`` and ``[B, N]``, -1 after the last. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU values of a tensor k are clamped to
            the valid range.

    Complexity: O(N) per row, O(N) extra memory.

    Paper: EViT (Liang et al. 2022, section 3.2), attentive and inattentive tokens; Focus-DETR
    (Zheng et al. 2023, section 3.2).

    Example:
        >>> import torch, tokenmill as tm
        >>> scores = torch.tensor([[0.1, 0.9, float("nan"), 0.9, 0.5]])
        >>> keep, rest = tm.topk_partition(scores, 3, protect_first=1)
        >>> keep.tolist(), rest.tolist()
        ([[0, 1, 3]], [[2, 4]])
        >>> tm.topk_partition(scores, torch.tensor([2]), max_k=3)[0].tolist()
        [[1, 3, -1]]
    """
    lowered = lower(scores, k, max_k=max_k, largest=largest, order=order, valid=valid,
                    protect_first=protect_first, protect_last=protect_last)  # fmt: skip
    keep, rest = call(SPEC, lowered, None, backend)
    return keep, rest


def lower(
    scores: Tensor, k: int | Tensor, *, max_k: int | None = None, **given: Any
) -> tuple[Any, ...]:
    a = FORWARD.fields(scores=scores, **given)
    if isinstance(k, Tensor):
        check_tensor(OP, "k", k)
        maximum = max_k if max_k is not None else scores.shape[-1] if scores.dim() else 0
        a["k"], a["counts"] = as_int(OP, "max_k", maximum), as_int32(k)
    else:
        check(max_k is None, OP, "max_k", "requires a tensor k", max_k)
        a["k"] = as_int(OP, "k", k)
    return tuple(a.values())


def _check_values(a: Any) -> None:
    if a.counts is None:
        return
    minimum = a.protect_first + a.protect_last
    bad = a.counts[(a.counts < minimum) | (a.counts > a.k)]
    if bad.numel():
        fail(OP, "k", f"must be {minimum} to {a.k}", int(bad[0]))


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    batch, tokens = a.scores.shape
    others = tokens - a.k if a.counts is None else tokens
    return (
        a.scores.new_empty((batch, a.k), dtype=torch.int32),
        a.scores.new_empty((batch, others), dtype=torch.int32),
    )


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        check_values=_check_values,
        triton="tokens.topk_partition:topk_partition",
    )
)
SPEC = register_op(
    OpSpec(
        function=topk_partition,
        lower=lower,
        reference=reference.topk_partition,
        forward=FORWARD,
        sharding=Sharding({"scores": "b.", "counts": "b", "valid": "b."}, ("b.", "b.")),
        paper="EViT (Liang et al. 2022), Focus-DETR (Zheng et al. 2023)",
        flops=lambda a: 1.0 * a.scores.numel(),
    )
)
