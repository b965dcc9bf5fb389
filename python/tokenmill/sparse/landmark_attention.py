"""landmark_attention: a grouped softmax with one landmark token per block."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

from torch import Tensor

from .._call.autocast import Autocast
from .._call.run import call
from .._check import check_bool
from .._flops import band
from .._lowering import scale_or_default
from ..reference.sparse import landmark_attention as reference
from ..registry import OpSpec, Sharding, register_op
from .gradients import register_pair

OP = "landmark_attention"


@overload
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 64,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal attention with a grouped softmax: a block is weighted by its last token, its
    landmark.

    Query i, in block c, applies one softmax over its own block and the landmarks of earlier blocks;
    the weight of a landmark is distributed over the tokens of its block. With logits :math:`z_j =
    \mathrm{scale}\; q_i \cdot k_j`, and :math:`\ell_b` the logit of the landmark of block b:

    .. math::
       Z = \sum_{b < c} e^{\ell_b} + \sum_{j \in c,\, j \le i} e^{z_j}, \qquad
       w_j = \frac{e^{z_j}}{Z} \;(j \in c), \qquad
       w_j = \frac{e^{\ell_b}}{Z} \, \frac{e^{z_j}}{\sum_{m \in b} e^{z_m}} \;(j \in b < c)

    where sums over the tokens of a block exclude its landmark: a landmark has weight 0, and as a
    query it sees the same keys as the token before it. The weights of a query sum to 1. The last
    block may be shorter than the others; it then has no landmark yet.

    Args:
        q: ``[B, S, H, D]`` float16, bfloat16 or float32 (float64 on the reference), D up to 256.
        k, v: ``[B, S, Hk, D]`` and ``[B, S, Hk, Dv]``, Hk a divisor of H.
        block: tokens of a block, including its landmark, at least 2.
        scale: factor of q.k; None = 1/sqrt(D).
        return_lse: also return lse, which is differentiable.
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, S, H, Dv]`` in the dtype of q; with return_lse also log Z, ``[B, H, S]`` float32,
        natural log. Gradients of q, k and v.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: the operations of causal attention, and one more exponential for each query and
    block, in one pass over the keys; memory linear in S, forward and backward. A block longer than
    a key tile (96 keys on CPUs, 16 to 64 on GPUs) is read twice.

    Paper: Landmark Attention (Mohtashami and Jaggi 2023), section 3.1.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 200, 4, 32) for _ in range(3))
        >>> tm.landmark_attention(q, k, v, block=50).shape
        torch.Size([1, 200, 4, 32])
    """
    given: dict[str, Any] = {"block": block, "scale": scale}
    if return_lse is not False:
        given["return_lse"] = return_lse
    out, lse = call(SPEC, (q, k, v), given, backend)
    return (out, lse) if return_lse else out


def lower(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **given: Any
) -> tuple[Any, ...]:
    check_bool(OP, "return_lse", return_lse)
    a = FORWARD.fields(q=q, k=k, v=v, **given)
    a["scale"] = scale_or_default(OP, a["scale"], q)
    return tuple(a.values())


def flops(a: Any) -> float:
    """Operations of the two products over the pairs visible under the causal mask."""
    batch, tokens, heads, dim = a.q.shape
    return 2.0 * batch * heads * band(tokens, tokens, -1, 0) * (dim + a.v.shape[-1])


def backward_flops(a: Any) -> float:
    """Operations of the five products of the backward."""
    return 2.5 * flops(a)


FORWARD, BACKWARD = register_pair(OP, Autocast(lower=("q", "k", "v")))
SPEC = register_op(
    OpSpec(
        function=landmark_attention,
        lower=lower,
        sugar=frozenset({"return_lse"}),
        reference=reference.landmark_attention,
        plain=functools.partial(reference.landmark_attention, upcast=False),
        forward=FORWARD,
        differentiable=("q", "k", "v"),
        logarithms=(1,),
        sharding=Sharding({"q k v": "b.h."}, ("b.h.", "bh.")),
        paper="Landmark Attention (Mohtashami and Jaggi 2023)",
        flops=flops,
        backward_flops=backward_flops,
    )
)
