"""reweighted_attention: weights of groups of keys multiplied by factors, after the softmax."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._call.autocast import Autocast
from .._check import (
    check,
    check_bool,
    check_choice,
    check_device_of_q,
    check_qkv,
    check_tensor,
    fail,
    is_any,
    reads_values,
)
from .attention import attention
from .terms import share_of

OP = "reweighted_attention"
Renormalize = Literal["others", "all", "none"]


@Autocast(lower=("q", "k", "v")).applied
def reweighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    factors: Tensor,
    *,
    causal: bool = False,
    renormalize: Renormalize = "others",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax attention whose weights are multiplied by a factor for each group of keys.

    With :math:`P_i = \operatorname{softmax}_j(scale\; q_i \cdot k_j)`, the group g(j) of key j and
    the weight :math:`W_{ig} = \sum_{g(j) = g} P_{ij}` of a group in a row,

    .. math::
       out_i = \sum_j P_{ij}\, c_{i,g(j)}\, v_j, \qquad c_{ig} = f_g \text{ except for}

    * renormalize="none": nothing else; rows no longer sum to 1.
    * renormalize="all": :math:`c_{ig} = f_g / \sum_h f_h W_{ih}`; rows sum to 1 again.
    * renormalize="others": :math:`c_{i0} = 1 + \sum_g (1 - f_g) W_{ig} / W_{i0}`; group 0 receives
      the weight that the others lose, in proportion to its weights. Where group 0 has no weight, it
      is dropped.

    The weight matrix is never materialised: f is a bias :math:`\log f_g` of the keys, and the lse
    gives the weight that it removed.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]``; Hk divides H.
        groups: int32 or int64 ``[B | 1, H | 1, Sk]``, 0 to G - 1; H counts query heads. A GPU
            treats keys with other numbers as ungrouped, with factor 1.
        factors: ``[G]`` or ``[H, G]``, nonnegative; with renormalize="others" at most 1, and 1 for
            group 0. float32 or the dtype of q.
        causal: query i sees keys j <= i + Sk - Sq (bottom-right aligned).
        renormalize: "others", "all" or "none".
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q. A query with no visible key has out 0. Gradients:
        q, k, v, factors (0 for a factor of 0).

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: one pass of :func:`attention` for "all", two for "none", three for "others"; memory
    linear in Sq and Sk.

    Paper: Unveiling and Harnessing Hidden Attention Sinks (ACT, Yu et al. 2024), section 4, and See
    What You Are Told (VAR, Kang et al. 2025), section 4, redistribute weights by "others". The
    complete methods, which also choose sinks, heads and rows, are :func:`sink_calibrated_attention`
    and :func:`redistributed_attention`; :func:`amplified_attention` applies gains to logits.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 50, 4, 32) for _ in range(3))
        >>> groups = torch.zeros(1, 1, 50, dtype=torch.int32)
        >>> groups[..., 0] = 1  # the first token is a sink
        >>> out = tm.reweighted_attention(q, k, v, groups, torch.tensor([1.0, 0.4]), causal=True)
        >>> out.shape
        torch.Size([1, 50, 4, 32])
    """
    _check(q, k, v, groups, factors, causal, renormalize)
    bias = _logarithms(groups, factors.to(torch.promote_types(q.dtype, torch.float32)))

    def attend(bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return attention(
            q, k, v, bias=bias, scale=scale, causal=causal, return_lse=True, backend=backend
        )

    out, lse = attend(bias)
    if renormalize == "all":
        return out
    share = share_of(lse, attend(None)[1])
    result = share * out.to(share.dtype)
    if renormalize == "others":
        first, _ = attend(torch.zeros_like(bias).masked_fill((groups != 0)[:, :, None], -torch.inf))
        result = result + (1 - share) * first.to(share.dtype)
    return result.to(q.dtype)


def _logarithms(groups: Tensor, factors: Tensor) -> Tensor:
    """The bias [B | 1, H | 1, 1, Sk] of each key: the log of its factor."""
    count = factors.shape[-1]
    place = groups.clamp(0, count - 1).long()
    known = (groups >= 0) & (groups < count)
    if factors.dim() == 2:
        rows = place.expand(-1, factors.shape[0], -1)
        of_keys = factors.expand(groups.shape[0], -1, -1).gather(2, rows)
    else:
        of_keys = factors[place]
    taken = of_keys > 0
    logs = torch.where(taken, of_keys, 1.0).log()  # avoids the gradient of log at 0
    logs = torch.where(taken, logs, -torch.inf)
    return torch.where(known, logs, 0.0)[:, :, None]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    factors: Tensor,
    causal: bool,
    renormalize: str,
) -> None:
    for name, t in (("q", q), ("k", k), ("v", v), ("groups", groups), ("factors", factors)):
        check_tensor(OP, name, t)
    check_qkv(OP, q, k, v, 4, True)
    check_bool(OP, "causal", causal)
    check_choice(OP, "renormalize", renormalize, "others", "all", "none")
    batch, heads, keys = q.shape[0], q.shape[2], k.shape[1]
    ok = groups.dtype in (torch.int32, torch.int64)
    check(ok, OP, "groups", "must be int32 or int64", groups.dtype)
    shape = tuple(groups.shape)
    if len(shape) != 3 or not (is_any(shape[0], 1, batch) and is_any(shape[1], 1, heads)):
        fail(OP, "groups", f"must have shape [{batch} or 1, {heads} or 1, {keys}]", shape)
    check(shape[2] == keys, OP, "groups", f"must have {keys} columns, one for each key", shape[2])
    check_device_of_q(OP, "groups", groups, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    ok = factors.dtype in (q.dtype, wide)
    check(ok, OP, "factors", "must be in float32 or the dtype of q", factors.dtype)
    ok = factors.dim() in (1, 2) and factors.shape[-1] > 0
    ok = ok and (factors.dim() == 1 or factors.shape[0] == heads)
    check(ok, OP, "factors", f"must have shape [G] or [{heads}, G], G at least 1", factors.shape)
    check_device_of_q(OP, "factors", factors, q)
    if reads_values(groups):
        _check_values(groups, factors, renormalize)


def _check_values(groups: Tensor, factors: Tensor, renormalize: str) -> None:
    count = factors.shape[-1]
    if groups.numel():
        low, high = int(groups.min()), int(groups.max())
        rule = f"must be 0 to {count - 1}, the last group of factors"
        check(low >= 0, OP, "groups", rule, low)
        check(high < count, OP, "groups", rule, high)
    if not factors.numel():
        return
    given = factors.detach()
    minimum, maximum = float(given.min()), float(given.max())
    check(0 <= minimum < torch.inf, OP, "factors", "must be finite and not negative", minimum)
    check(maximum < torch.inf, OP, "factors", "must be finite and not negative", maximum)
    if renormalize == "others":
        check(maximum <= 1, OP, "factors", "must be at most 1 with renormalize 'others'", maximum)
        first = float(given[..., 0].min())
        check(first == 1, OP, "factors", "must be 1 for group 0 with renormalize 'others'", first)
