"""reconstruct_tokens: tokens as weighted means of the values of their nearest centroids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autocast import Autocast
from .._call.autograd import Gradients, kept
from .._call.operator import TorchOp
from .._call.run import call
from ..reference.tokens import reconstruct_tokens as reference
from ..registry import OpSpec, Sharding, register_op
from ._rows import contiguous_rows

OP = "reconstruct_tokens"


def reconstruct_tokens(
    features: Tensor,
    centroids: Tensor,
    values: Tensor,
    *,
    k: int = 3,
    tau: float,
    norm: str = "l1",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Reconstructs tokens as weighted means of the values of their k nearest centroids:

    .. math::
       w_{nm} = e^{-\tau \lVert f_n - s_m \rVert^2}, \qquad
       out_n = \sum_m w_{nm} z_m \Big/ \sum_m w_{nm}

    over the k centroids at minimum distance, ties to the first. With norm "l2" the weights of a
    token are divided by their Euclidean norm instead. The minimum distance of a token is subtracted
    before the exponential, so that its weights never all underflow.

    Args:
        features: f, ``[B, N, C]`` float16, bfloat16 or float32 (float64 on the reference), any
            strides with a contiguous last dimension, C up to 4096: tokens before clustering.
        centroids: s, ``[B, M, C]`` in the dtype of features.
        values: z, ``[B, M, Cv]`` in the dtype of features: centroids after some layers.
        k: number of centroids per token, 1 to M.
        tau: factor of the squared distance, at least 0.
        norm: "l1" (weights sum to 1) or "l2", as in the published code.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (out, index, weight): ``[B, N, Cv]`` in the dtype of values, int32 ``[B, N, k]``, ascending,
        and their weights ``[B, N, k]``, float32 (float64 on the reference). A distance that is not
        finite counts as the largest float32; if all are, the weights are NaN. out is differentiable
        in values. Distances are float32 sums of squared differences; where two differ by no more
        than their rounding, backends may differ.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 3 B N M C operations to find the nearest and 2 B N k Cv for the means. The distance
    matrix is never materialised.

    Paper: Expedit (Liang et al. 2022), token reconstruction.

    Example:
        >>> import torch, tokenmill as tm
        >>> tokens = torch.randn(1, 16, 16, 32)
        >>> centroids, _, _ = tm.cluster_tokens(tokens, 8, tau=0.05)
        >>> centroids = centroids.flatten(1, 2)
        >>> out, index, weight = tm.reconstruct_tokens(
        ...     tokens.flatten(1, 2), centroids, centroids, tau=0.05)
        >>> out.shape, index.shape
        (torch.Size([1, 256, 32]), torch.Size([1, 256, 3]))
    """
    lowered = lower(features, centroids, values, k=k, tau=tau, norm=norm)
    out, index, weight = call(SPEC, lowered, None, backend)
    return out, index, weight


def lower(
    features: Tensor, centroids: Tensor, values: Tensor, *, tau: float, **given: Any
) -> tuple[Any, ...]:
    a = FORWARD.fields(features=features, centroids=centroids, values=values, tau=tau, **given)
    for name in ("features", "centroids"):
        if a[name].requires_grad:
            a[name] = a[name].detach()
    return tuple(a.values())


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = a.features.shape[:2]
    return (
        a.features.new_empty((batch, tokens, a.values.shape[2])),
        a.features.new_empty((batch, tokens, a.k), dtype=torch.int32),
        a.features.new_empty((batch, tokens, a.k), dtype=torch.float32),
    )


def _backward(
    ops: Any, ctx: Any, dout: Tensor | None, dindex: None, dweight: Tensor | None
) -> Gradients:
    a, (index, weight) = kept(ctx)
    if dout is None:
        return {"values": a.values.new_zeros(a.values.shape)}
    dvalues = ops.reconstruct_tokens_backward(contiguous_rows(dout), index, weight, *a)
    return {"values": dvalues}


def _flops(a: Any) -> float:
    return 3.0 * a.features.numel() * a.centroids.shape[1] + _backward_flops(a)


def _backward_flops(a: Any) -> float:
    return 2.0 * a.features.shape[0] * a.features.shape[1] * a.k * a.values.shape[2]


FORWARD = register(
    TorchOp(
        OP,
        autocast=Autocast(promote=("features", "centroids", "values")),
        fake=_fake,
        triton="tokens.reconstruct_tokens:reconstruct_tokens",
        backward=_backward,
        saves=("index", "weight"),
        constant=("index", "weight"),
    )
)
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=lambda a: a.values.new_empty(a.values.shape),
        triton="tokens.reconstruct_tokens:reconstruct_tokens_backward",
    )
)
SPEC = register_op(
    OpSpec(
        function=reconstruct_tokens,
        lower=lower,
        reference=reference.reconstruct_tokens,
        forward=FORWARD,
        differentiable=("values",),
        sharding=Sharding(
            {"features": "br.~c", "centroids": "b..", "values": "b.c"},
            ("brc", "br.~c", "br.~c"),
        ),
        paper="Expedit (Liang et al. 2022)",
        flops=_flops,
        backward_flops=_backward_flops,
    )
)  # fmt: skip
