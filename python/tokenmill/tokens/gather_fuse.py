"""gather_fuse: gathers the kept tokens and fuses the rest into one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autograd import Gradients, kept
from .._call.operator import TorchOp
from .._call.run import call
from .._check import check_tensor
from .._lowering import widen
from ..reference.tokens import gather_fuse as reference
from ..registry import OpSpec, Sharding, register_op
from ._rows import as_int32, check_index_values, contiguous_rows

OP = "gather_fuse"


def gather_fuse(
    x: Tensor,
    keep: Tensor,
    rest: Tensor,
    weight: Tensor,
    *,
    prefix: int = 1,
    normalize: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Gathers the prefix tokens and the patches to keep, and fuses the rest into one token.

    With x = [prefix tokens; patches] the result is :math:`[prefix;\ x_{keep};\ f]` with
    :math:`f = \sum_{j \in rest} w_j x_j`, the token reorganisation after an attention layer, in one
    pass. Kept rows are copied bit for bit; f is summed in float32.

    Args:
        x: ``[B, prefix + N, C]``, float16, bfloat16 or float32 (float64 on the reference), any
            strides with a contiguous last dimension.
        keep: ``[B, K]`` int32 or int64, patches 0 to N - 1 (patch j is token prefix + j); -1 gives
            a row of zeros.
        rest: ``[B, R]`` int32 or int64, the patches summed in f; -1 is skipped. keep and rest
            together name no patch twice; patches in neither are dropped.
        weight: ``[B, N]``, any floating-point dtype, converted to float32.
        prefix: number of first tokens (the class token) that are always kept.
        normalize: divide f by the sum of its weights; f is 0 where the sum is 0. False as in EViT,
            whose fused token is a sum.
        out: preallocated result: shape and dtype as returned, any non-overlapping strides with a
            contiguous last dimension; it shares no element with another argument (disjoint parts of
            one tensor are allowed). Needs no_grad or arguments without gradient.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        ``[B, prefix + K + 1, C]`` in the dtype of x. Differentiable in x and weight. Without
        patches in rest the last row is 0.

    Raises:
        RuntimeError: naming argument, rule and value. On a GPU an index out of range counts as -1,
            and the gradient of a repeated patch is taken from its last occurrence (in keep, then
            rest).

    Complexity: reads (prefix + K + R)·C elements and writes (prefix + K + 1)·C per sequence.

    Paper: EViT (Liang et al. 2022), section 3.2.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.tensor([[[9.0], [1.0], [2.0], [3.0]]])
        >>> weight = torch.tensor([[0.5, 0.25, 0.25]])
        >>> keep, rest = torch.tensor([[2]]), torch.tensor([[0, 1]])
        >>> tm.gather_fuse(x, keep, rest, weight).flatten().tolist()
        [9.0, 3.0, 1.0]
        >>> float(tm.gather_fuse(x, keep, rest, weight, normalize=True)[0, -1])
        1.3333333730697632
    """
    check_tensor(OP, "out", out, optional=True)
    lowered = lower(x, keep, rest, weight, prefix=prefix, normalize=normalize)
    result: Tensor = call(SPEC, lowered, None, backend, out)[0]
    return result


def lower(x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor, **given: Any) -> tuple[Any, ...]:
    a = FORWARD.fields(x=x, keep=keep, rest=rest, weight=weight, **given)
    a["keep"], a["rest"], a["weight"] = as_int32(keep), as_int32(rest), widen(weight, x)
    return tuple(a.values())


def _check_values(a: Any) -> None:
    patches = a.x.shape[1] - a.prefix
    check_index_values(OP, "keep", a.keep, patches)
    check_index_values(OP, "rest", a.rest, patches)
    check_index_values(OP, "rest", torch.cat((a.keep, a.rest), 1), patches, repeats=False)


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    batch, _, channels = a.x.shape
    out = a.x.new_empty((batch, a.prefix + a.keep.shape[1] + 1, channels))
    return out, a.x.new_empty(a.x.shape[:1], dtype=torch.float32)


def _fake_backward(a: Any) -> tuple[Tensor, Tensor]:
    return a.x.new_empty(a.x.shape), a.x.new_empty(a.weight.shape, dtype=torch.float32)


def _backward(ops: Any, ctx: Any, dout: Tensor | None, dweight_sum: None) -> Gradients:
    if dout is None:
        return {}
    a, (out, weight_sum) = kept(ctx)
    dx, dweight = ops.gather_fuse_backward(contiguous_rows(dout), out, weight_sum, *a)
    return {"x": dx, "weight": dweight}


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        check_values=_check_values,
        triton="tokens.gather_fuse:gather_fuse",
        backward=_backward,
        saves=("out", "weight_sum"),
        constant=("weight_sum",),
    )
)
OUT = register(TorchOp(OP + "_out", triton="tokens.gather_fuse:gather_fuse_out"))
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="tokens.gather_fuse:gather_fuse_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=gather_fuse,
        lower=lower,
        reference=reference.gather_fuse,
        forward=FORWARD,
        differentiable=("x", "weight"),
        sharding=Sharding(
            {"x": "b.c", "keep rest weight": "b."},
            ("b.c", "b~c"),
        ),
        paper="EViT (Liang et al. 2022)",
        flops=lambda a: 2.0 * a.rest.numel() * a.x.shape[2],
    )
)
