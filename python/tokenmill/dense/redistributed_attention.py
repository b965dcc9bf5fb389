"""redistributed_attention: moves weight from attention sinks to the image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._call.autocast import Autocast
from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_device_of_q,
    check_qkv,
    check_tensor,
    fail,
    is_any,
)
from ..select.massive_activations import massive_activations
from .attention import attention
from .terms import share_of

OP = "redistributed_attention"
EPS = 1e-6  # added to each visual weight where their sum is a divisor


@Autocast(lower=("q", "k", "v")).applied
def redistributed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image: tuple[int, int],
    *,
    hidden: Tensor | None = None,
    sink_dims: Sequence[int] | None = None,
    tau: float = 20.0,
    sinks: Tensor | None = None,
    rho: float = 0.5,
    min_visual: float = 0.2,
    p: float = 0.6,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax attention that moves the weight of sinks to visual tokens in image-centric heads.

    With the weights :math:`V_i` of all visual tokens in row i of a head and :math:`S_i` of the
    visual sinks, the row is image-centric if it stands after the image, the request has a visual
    sink, :math:`S_i \le \rho\,(V_i + 10^{-6} N)` for N visual tokens, and
    :math:`V_i \ge min\_visual`. There the weights of **all** sinks, of image and text, are
    multiplied by p, and the weight removed is given to the visual tokens that are not sinks, in
    proportion to their weights. Other rows have plain attention.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]``; Hk divides H (GQA).
        image: (begin, end) of the visual tokens among the keys, the same for all requests.
        hidden: ``[B, Sk, C]``, the input of the layer, before its norm: sinks are
            ``massive_activations(hidden, sink_dims, threshold=tau)``. None: sinks are given.
        sink_dims: the dimensions of hidden that identify sinks (see :func:`massive_activations`).
        tau: threshold of a massive activation, in root mean squares of hidden.
        sinks: bool ``[B | 1, Sk]``, instead of hidden: a decode step passes the sinks of the
            prompt, and False for new tokens.
        rho: largest share of the visual sinks in the weight of the visual tokens.
        min_visual: minimum weight of the visual tokens.
        p: fraction of its weight that a sink keeps, 0 to 1.
        causal: query i sees keys j <= i + Sk - Sq (bottom-right aligned).
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q. Gradients: q, k, v, not through the choice of rows
        and sinks.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: for the rows after the image two passes of :func:`attention` over all keys and two
    over the image, for the others one; memory is linear in Sq and Sk.

    Paper: See What You Are Told (VAR, Kang et al. 2025), section 4; the defaults, and text sinks
    that give weight too, follow the released code, which applies it in all layers from the third
    on. The prompt decides which tokens are sinks, for decode steps as well.

    Example:
        >>> import torch, tokenmill as tm
        >>> q, k, v = (torch.randn(1, 50, 4, 32) for _ in range(3))
        >>> hidden = torch.randn(1, 50, 512).clamp(-3, 3)
        >>> hidden[0, [0, 7], 100] = 60.0  # the first token and one of the image are sinks
        >>> out = tm.redistributed_attention(
        ...     q, k, v, (5, 41), hidden=hidden, sink_dims=(100,), rho=0.5
        ... )
        >>> sinks = tm.massive_activations(hidden, (100,))
        >>> torch.equal(out, tm.redistributed_attention(q, k, v, (5, 41), sinks=sinks))
        True
    """
    begin, end = _check(q, k, v, image, hidden, sink_dims, sinks, causal)
    limits = []
    for name, value in (("rho", rho), ("min_visual", min_visual), ("p", p)):
        limits.append(as_number(OP, name, value))
        check(0 <= limits[-1] <= 1, OP, name, "must be 0 to 1", value)
    if sinks is None:
        assert hidden is not None and sink_dims is not None
        sinks = massive_activations(hidden, sink_dims, threshold=tau)
    wide = torch.promote_types(q.dtype, torch.float32)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        return attention(
            q, k, v, bias=bias, scale=scale, causal=causal, return_lse=True, backend=backend
        )

    out, lse = attend(q, k, v, None, causal)
    first = max(end - (k.shape[1] - q.shape[1]), 0)  # the row of the first token after the image
    if first >= q.shape[1] or begin == end:
        return out
    plain, whole, late = out[:, first:], lse[:, :, first:], q[:, first:]
    factors = torch.zeros(sinks.shape, dtype=wide, device=q.device)
    factors = factors.masked_fill(sinks, math.log(limits[2]) if limits[2] else -math.inf)
    lowered, lowered_lse = attend(late, k, v, factors[:, None, None], causal)
    visual = sinks[:, None, None, begin:end]
    hide = torch.zeros(visual.shape, dtype=wide, device=q.device)
    pictures = (k[:, begin:end], v[:, begin:end])  # keys visible to all of these rows
    others, others_lse = attend(late, *pictures, hide.masked_fill(visual, -math.inf), False)
    with torch.no_grad():
        _, sunk_lse = attend(late, *pictures, hide.masked_fill(~visual, -math.inf), False)
        sunk = share_of(sunk_lse, whole)
        seen = sunk + share_of(others_lse, whole)
        centric = (sunk <= limits[0] * (seen + EPS * (end - begin))) & (seen >= limits[1])
        centric = centric & visual.any(-1, keepdim=True)
    share = share_of(lowered_lse, whole)
    moved = share * lowered.to(share.dtype) + (1 - share) * others.to(share.dtype)
    changed = torch.where(centric, moved.to(q.dtype), plain)
    return torch.cat((out[:, :first], changed), 1) if first else changed


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image: tuple[int, int],
    hidden: Tensor | None,
    sink_dims: Sequence[int] | None,
    sinks: Tensor | None,
    causal: bool,
) -> tuple[int, int]:
    check_tensor(OP, "hidden", hidden, optional=True)
    check_tensor(OP, "sinks", sinks, optional=True)
    check_qkv(OP, q, k, v, 4, True)
    check_bool(OP, "causal", causal)
    batch, keys = k.shape[:2]
    rule = "must be two ints (begin, end)"
    if not (isinstance(image, tuple | list) and len(image) == 2):
        fail(OP, "image", rule, image)
    begin, end = (as_int(OP, "image", place, rule) for place in image)
    ok = 0 <= begin <= end <= keys
    check(ok, OP, "image", f"must be 0 <= begin <= end <= {keys}", [begin, end])
    if (hidden is None) == (sinks is None):
        fail(OP, "sinks", "must be given without hidden, or hidden without them", sinks)
    if sinks is not None:
        check(sinks.dtype == torch.bool, OP, "sinks", "must be bool", sinks.dtype)
        if not is_any(tuple(sinks.shape), (1, keys), (batch, keys)):
            fail(OP, "sinks", f"must have shape [{batch} or 1, {keys}]", sinks.shape)
        check_device_of_q(OP, "sinks", sinks, q)
    if hidden is not None:
        if hidden.dim() != 3 or tuple(hidden.shape[:2]) != (batch, keys):
            fail(OP, "hidden", f"must have shape [{batch}, {keys}, C]", hidden.shape)
        check_device_of_q(OP, "hidden", hidden, q)
        if sink_dims is None:
            fail(OP, "sink_dims", "must be given with hidden", sink_dims)
    return begin, end
