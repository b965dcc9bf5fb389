"""additive_attention: scores v . tanh(q + k), and the argmax over the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, kept
from .._call.operator import TorchOp
from .._call.run import call
from .._check import check, check_device_of, check_dtype_of, check_tensor
from ..reference.dense import additive_attention as reference
from ..registry import OpSpec, Sharding, register_op

OP, POINTER = "additive_attention", "pointer_argmax"


@Autocast(lower=("q", "k", "v_weight", "values")).applied
def additive_attention(
    q: Tensor,
    k: Tensor,
    v_weight: Tensor,
    values: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Additive attention: its scores, or the values weighted by their softmax.

    .. math::
       u_{ij} = v \cdot \tanh(q_i + k_j), \qquad out_i = \sum_j \operatorname{softmax}_j(u_i)\,
       values_j

    with q and k already projected (:math:`W_2 d_i` and :math:`W_1 e_j`). The ``[B, T, N, A]``
    tensor of tangents is never materialised: the backward recomputes it. Softmax and the product
    with values are PyTorch's.

    Args:
        q: ``[B, T, A]`` float16, bfloat16 or float32 (float64 on the reference), T queries.
        k: ``[B, N, A]`` in the dtype of q, N inputs.
        v_weight: ``[A]`` in the dtype of q.
        values: ``[B, N, C]`` in the dtype of q. None: return the scores.
        mask: bool ``[B, N]`` or ``[B, T, N]``, True = visible. None: all.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        scores ``[B, T, N]``, -inf for masked pairs, or out ``[B, T, C]``, in the dtype of q; a
        query with no visible input has out 0. Masked pairs, NaN included, affect neither scores nor
        gradients. Gradients: q, k, v_weight, values.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: B T N A tangents, as many again in the backward (twice as many on a GPU); extra
    memory for the float32 scores, and in the backward for a few tensors the size of q and k.

    Paper: Pointer Networks (Vinyals et al. 2015), section 2.3; section 2.2 for values.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
        >>> tm.additive_attention(q, k, torch.randn(16)).shape
        torch.Size([2, 5, 9])
    """
    lowered = lower(q, k, v_weight, values, mask=mask)
    if values is not None:
        FORWARD.check(*lowered, float64=True)
        check_dtype_of(OP, "values", values, "q", q)
        check_device_of(OP, "values", values, "q", q)
        rule = f"must have shape [{k.shape[0]}, {k.shape[1]}, C]"
        ok = values.dim() == 3 and values.shape[:2] == k.shape[:2]
        check(ok, OP, "values", rule, values.shape)
    (scores,) = call(SPEC, lowered, None, backend)
    if values is None:
        return scores.to(q.dtype)
    if mask is not None:  # the whole row is -inf
        seen = (mask[:, None] if mask.dim() == 2 else mask).any(-1, keepdim=True)
        weights = torch.where(seen, torch.where(seen, scores, 0.0).softmax(-1), 0.0)
    else:
        weights = scores.softmax(-1)
    return weights.to(q.dtype) @ values


def pointer_argmax(
    q: Tensor,
    k: Tensor,
    v_weight: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The input that each query points to: the largest score of :func:`additive_attention`.

    Args:
        q, k, v_weight, mask, backend: as in :func:`additive_attention`.

    Returns:
        int64 ``[B, T]``; the first of equal scores, never a score of NaN or -inf; -1 where there is
        no other. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: Pointer Networks (Vinyals et al. 2015), section 2.3.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k = torch.zeros(1, 1, 1), torch.tensor([[[0.5], [2.0], [1.0]]])
        >>> tm.pointer_argmax(q, k, torch.ones(1)).tolist()
        [[1]]
    """
    lowered = _lower(POINTER, q, k, v_weight, mask)
    FORWARD.check(*lowered, float64=True, op=POINTER)
    with torch.no_grad():
        (scores,) = call(SPEC, lowered, None, backend)
        if k.shape[1] == 0:
            return torch.full(q.shape[:2], -1, device=q.device)
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        best, at = scores.max(-1)
        return torch.where(best == -torch.inf, -1, at)


def lower(
    q: Tensor,
    k: Tensor,
    v_weight: Tensor,
    values: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> tuple[Any, ...]:
    check_tensor(OP, "values", values, optional=True)
    return _lower(OP, q, k, v_weight, mask)


def _lower(op: str, q: Tensor, k: Tensor, v_weight: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    for name, t in (("q", q), ("k", k), ("v_weight", v_weight)):
        check_tensor(op, name, t)
    check_tensor(op, "mask", mask, optional=True)
    # Copies cost little compared with the tangents.
    return tuple(t if t is None or _is_whole(t) else t.contiguous() for t in (q, k, v_weight, mask))


def _is_whole(t: Tensor) -> bool:
    """Whether the last dimension is contiguous."""
    return t.dim() == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1


def _fake(a: Any) -> Tensor:
    wide = torch.promote_types(a.q.dtype, torch.float32)
    return a.q.new_empty((a.q.shape[0], a.q.shape[1], a.k.shape[1]), dtype=wide)


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (a.q, a.k, a.v_weight))


def _backward(ops: Any, ctx: Any, dscores: Tensor | None) -> Gradients:
    if dscores is None:
        return {}
    a, _ = kept(ctx)
    dscores = dscores if _is_whole(dscores) else dscores.contiguous()
    dq, dk, dv_weight = ops.additive_attention_backward(dscores, *a)
    return {"q": dq, "k": dk, "v_weight": dv_weight}


def _tangents(a: Any) -> float:
    return float(a.q.shape[0] * a.q.shape[1] * a.k.shape[1] * a.q.shape[2])


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(lower=("q", "k", "v_weight")),
        fake=_fake,
        triton="dense.additive_attention:additive_attention",
        backward=_backward,
    )
)
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=_fake_backward,
        triton="dense.additive_attention:additive_attention_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=additive_attention,
        lower=lower,
        reference=reference.additive_attention,
        forward=FORWARD,
        differentiable=("q", "k", "v_weight"),
        sharding=Sharding({"q": "br.", "k": "b..", "v_weight": ".", "mask": "br. b."}, ("br.",)),
        paper="Pointer Networks (Vinyals et al. 2015)",
        # A sum, a tangent, a product and an accumulation per (query, key, channel).
        flops=lambda a: 4.0 * _tangents(a),
        # Two for the tangent, four for d, five for the gradients.
        backward_flops=lambda a: 11.0 * _tangents(a),
    )
)
