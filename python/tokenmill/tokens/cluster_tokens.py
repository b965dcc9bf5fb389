"""cluster_tokens: soft clustering of a map's pixels into a coarser grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.attach import register
from .._call.autograd import Gradients, kept
from .._call.operator import TorchOp
from .._call.run import call
from .._check import as_int, check
from ..reference.tokens import cluster_tokens as reference
from ..registry import OpSpec, Sharding, register_op

OP = "cluster_tokens"


def cluster_tokens(
    x: Tensor,
    grid: int | tuple[int, int],
    *,
    iters: int = 5,
    tau: float,
    window: int = 7,
    window_labels: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Soft clustering of the pixels of a map into a coarser grid.

    Centroids start as the adaptive average pool of x. The home of pixel (y, x) is the cell
    (y·gy // Y, x·gx // X) of the grid; its candidates are the clusters whose cell is at most window
    // 2 rows and columns from there. Each iteration is

    .. math::
       Q_{mn} = \operatorname{softmax}_m(-\tau \lVert x_n - c_m \rVert^2), \qquad
       c_m \leftarrow \sum_n Q_{mn} x_n \Big/ \sum_n Q_{mn}

    with the softmax over the candidates of pixel n; a weight below 2^-100 times the largest weight
    of its pixel is 0. A cluster without weight keeps its centroid.

    Args:
        x: ``[B, Y, X, C]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, C up to 4096.
        grid: (gy, gx) clusters along Y and X, at most Y and X; an integer sets both.
        iters: iterations, 1 to 1000.
        tau: factor of the squared distance, at least 0.
        window: side of the square of candidate cells around a pixel's home, odd.
        window_labels: labels hold the nearest candidate, not the nearest of all clusters.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (centroids, labels, mass): ``[B, gy, gx, C]`` in the dtype of x, int32 ``[B, Y, X]`` and
        ``[B, gy, gx]`` float32. labels hold the number, row-major in the gy·gx grid, of the cluster
        with the nearest centroid before rounding, ties to the first; a distance that is not finite
        counts as the largest float32. mass is the sum of Q in the last iteration, 0 for a cluster
        that kept its centroid. Centroids are differentiable in x, with Q taken as constant: the
        gradient only passes through the last mean. Distances are float32 sums of squared
        differences; where the two smallest distances of a pixel differ by no more than their
        rounding, backends may differ.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 5 B Y X window^2 C operations per iteration, and 3 B Y X gy gx C for labels among
    all clusters. The matrix of pixels and clusters is never materialised.

    Paper: Expedit (Liang et al. 2022), token clustering; superpixel sampling networks (Jampani et
    al. 2018).

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(1, 16, 16, 32)
        >>> centroids, labels, mass = tm.cluster_tokens(x, (8, 8), tau=0.05)
        >>> centroids.shape, labels.shape, round(mass.sum().item())
        (torch.Size([1, 8, 8, 32]), torch.Size([1, 16, 16]), 256)
    """
    lowered = lower(x, grid, iters=iters, tau=tau, window=window, window_labels=window_labels)
    centroids, labels, mass, _ = call(SPEC, lowered, None, backend)
    return centroids, labels, mass


def lower(x: Tensor, grid: int | tuple[int, int], *, tau: float, **given: Any) -> tuple[Any, ...]:
    a = FORWARD.fields(x=x, tau=tau, **given)
    sides = tuple(grid) if isinstance(grid, tuple | list) else (grid, grid)
    check(len(sides) == 2, OP, "grid", "must be an integer or two", grid)
    a["grid_y"], a["grid_x"] = as_int(OP, "grid", sides[0]), as_int(OP, "grid", sides[1])
    return tuple(a.values())


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (a.x.shape[0], a.grid_y, a.grid_x)
    centroids = a.x.new_empty((*shape, a.x.shape[3]))
    return (
        centroids,
        a.x.new_empty(a.x.shape[:3], dtype=torch.int32),
        a.x.new_empty(shape, dtype=torch.float32),
        torch.empty_like(centroids, dtype=torch.float32),
    )


def _backward(
    ops: Any,
    ctx: Any,
    dcentroids: Tensor | None,
    dlabels: None,
    dmass: Tensor | None,
    dprevious: Tensor | None,
) -> Gradients:
    a, (mass, previous) = kept(ctx)
    if dcentroids is None:
        return {"x": a.x.new_zeros(a.x.shape)}
    dx = ops.cluster_tokens_backward(dcentroids.contiguous(), mass, previous, *a)
    return {"x": dx}


def _flops(a: Any) -> float:
    reach = min(a.window, a.grid_y) * min(a.window, a.grid_x)
    labels = reach if a.window_labels else a.grid_y * a.grid_x
    return a.x.numel() * (5.0 * reach * a.iters + 3.0 * labels)


def _backward_flops(a: Any) -> float:
    """Operations of the gradient of the last iteration."""
    return 5.0 * a.x.numel() * min(a.window, a.grid_y) * min(a.window, a.grid_x)


FORWARD = register(
    TorchOp(
        OP,
        fake=_fake,
        triton="tokens.cluster_tokens:cluster_tokens",
        backward=_backward,
        saves=("mass", "previous"),
        constant=("labels", "mass", "previous"),
    )
)
BACKWARD = register(
    TorchOp(
        OP + "_backward",
        fake=lambda a: a.x.new_empty(a.x.shape),
        triton="tokens.cluster_tokens:cluster_tokens_backward",
    )
)
# Gradients take Q as constant, unlike numerical differentiation of the reference: in the samples Q
# hardly depends on x.
SPEC = register_op(
    OpSpec(
        function=cluster_tokens,
        lower=lower,
        reference=reference.cluster_tokens,
        forward=FORWARD,
        differentiable=("x",),
        sharding=Sharding({"x": "b..."}, ("b...", "b..", "b..", "b...")),
        paper="Expedit (Liang et al. 2022)",
        flops=_flops,
        backward_flops=_backward_flops,
    )
)  # fmt: skip
