"""segment_reduce: reduces the rows of each segment of a sequence to one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autograd import Gradients, kept, needed_gradients
from .._call.operator import TorchOp
from .._call.run import call
from .._check import check, check_bool
from .._lowering import widen
from ..reference.tokens import segment_reduce as reference
from ..registry import OpSpec, Sharding, register_op
from ._rows import check_index_values, contiguous_rows

OP = "segment_reduce"


def segment_reduce(
    x: Tensor,
    offsets: Tensor,
    *,
    weight: Tensor | None = None,
    perm: Tensor | None = None,
    reduce: str = "sum",
    return_weight_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Reduces the rows of each segment to one: sum, mean, maximum, minimum, first or last.

    Segment s of a sequence is its rows ``offsets[s]`` to ``offsets[s + 1] - 1``, or with perm the
    rows listed at these positions of perm. An empty segment gives 0. Sums are float32 in an order
    that only depends on the offsets.

    Args:
        x: ``[B, N, C]``, or ``[T, C]`` for consecutive sequences, float16, bfloat16 or
            float32 (float64 on the reference), any strides with a contiguous last dimension.
        offsets: int32 ``[B, S + 1]``, for x ``[T, C]`` ``[S + 1]`` (cu_seqlens). Not decreasing,
            each 0 to N (or P).
        weight: ``[B, N]`` or ``[T]`` of any floating type, one per row of x, with "sum" and "mean";
            converted to float32. None: 1.
        perm: int32 ``[B, P]`` or ``[P]``, rows of x in order of the segments, -1 for none. Between
            the first and the last offset no row may repeat; other positions are not read.
        reduce: "sum" :math:`\sum w x`, "mean" :math:`\sum w x / W` with :math:`W = \sum w` (0 where
            W is 0), "amax" or "amin" in each channel (NaN wins), "first" or "last" row.
        return_weight_sum: also return W (without weight, and for the other reductions: the number
            of rows).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        y or (y, weight_sum): ``[B, S, C]`` or ``[S, C]`` in the dtype of x, and ``[B, S]`` or
        ``[S]`` float32. Differentiable in x and weight. The whole gradient of an extreme goes to
        the first row of the segment that attains it.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads the rows once and writes S·C elements.

    Paper: Learn Your Tokens (Thawani et al. 2023), pooling of words; PoNet (Tan et al. 2022),
    pooling of segments.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.tensor([[1.0], [2.0], [6.0]])
        >>> offsets = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
        >>> tm.segment_reduce(x, offsets).tolist()
        [[3.0], [0.0], [6.0]]
        >>> mean, size = tm.segment_reduce(x, offsets, reduce="mean", return_weight_sum=True)
        >>> mean.tolist(), size.tolist()
        ([[1.5], [0.0], [6.0]], [2.0, 0.0, 1.0])
    """
    lowered = lower(x, offsets, weight=weight, perm=perm, reduce=reduce,
                    return_weight_sum=return_weight_sum)  # fmt: skip
    y, weight_sum, _ = call(SPEC, lowered, None, backend)
    if x.dim() == 2:
        y, weight_sum = y.squeeze(0), weight_sum.squeeze(0)
    return (y, weight_sum) if return_weight_sum else y


def lower(
    x: Tensor, offsets: Tensor, *, return_weight_sum: bool = False, **given: Any
) -> tuple[Any, ...]:
    a = FORWARD.fields(x=x, offsets=offsets, **given)
    check_bool(OP, "return_weight_sum", return_weight_sum)
    rule = "must have 3 dimensions [B, N, C] or 2 [T, C]"
    check(x.dim() in (2, 3), OP, "x", rule, x.dim())
    if x.dim() == 2:
        a["x"] = x[None]
        for name in ("offsets", "perm", "weight"):
            if (t := a[name]) is not None:
                check(t.dim() == 1, OP, name, "must have 1 dimension with x [T, C]", t.dim())
                a[name] = t[None]
    if (weight := a["weight"]) is not None:
        rule = "must be of a floating type"
        check(weight.is_floating_point(), OP, "weight", rule, weight.dtype)
        a["weight"] = widen(weight, x)
    return tuple(a.values())


def _check_values(a: Any) -> None:
    tokens = a.x.shape[1]
    places = tokens if a.perm is None else a.perm.shape[1]
    for b, ends in enumerate(a.offsets.tolist()):
        for i, end in enumerate(ends):
            check(0 <= end <= places, OP, "offsets", f"must be 0 to {places}", end)
            check(i == 0 or end >= ends[i - 1], OP, "offsets", "must not decrease", end)
        if a.perm is not None:
            used = a.perm[b, ends[0] : ends[-1]]
            check_index_values(OP, "perm", used[None], tokens, repeats=False)


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, channels = a.x.shape
    shape = (batch, a.offsets.shape[1] - 1, channels)
    arg_shape = shape if a.reduce in ("amax", "amin") else (0,)
    return (
        a.x.new_empty(shape),
        a.x.new_empty(shape[:2], dtype=torch.float32),
        a.x.new_empty(arg_shape, dtype=torch.int32),
    )


def _fake_backward(a: Any) -> tuple[Tensor, Tensor]:
    shape = a.weight.shape if a.needs_dweight and a.weight is not None else (0,)
    return a.x.new_empty(a.x.shape), a.x.new_empty(shape, dtype=torch.float32)


def _backward(
    ops: Any, ctx: Any, dy: Tensor | None, dweight_sum: Tensor | None, darg: None
) -> Gradients:
    a, (y, weight_sum, arg) = kept(ctx)
    needs_dweight = needed_gradients(ctx)["weight"]
    dy = y.new_zeros(y.shape) if dy is None else contiguous_rows(dy)
    if dweight_sum is not None:
        dweight_sum = dweight_sum.contiguous() if needs_dweight else None
    dx, dweight = ops.segment_reduce_backward(
        dy, dweight_sum, y, weight_sum, arg, needs_dweight, *a
    )
    return {"x": dx, "weight": dweight if needs_dweight else None}


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        check_values=_check_values,
        triton="tokens.segment_reduce:segment_reduce",
        backward=_backward,
        saves=("y", "weight_sum", "arg"),
    )
)
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="tokens.segment_reduce:segment_reduce_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=segment_reduce,
        lower=lower,
        reference=reference.segment_reduce,
        plain=reference.segment_reduce,  # float32 sums: a 16-bit sum of PyTorch's is no closer
        forward=FORWARD,
        differentiable=("x", "weight"),
        sharding=Sharding(
            {"x": "b.c", "offsets perm weight": "b."},
            ("b.c", "b.~c", "b.c"),
        ),
        paper="Learn Your Tokens (Thawani et al. 2023), PoNet (Tan et al. 2022)",
        flops=lambda a: 2.0 * a.x.numel(),
    )
)
