"""soft_causal_attention: attention with a causal mask that fades in, applied after the softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from .._call.autocast import Autocast
from .._check import (
    as_number,
    check,
    check_device_of_q,
    check_float32,
    check_qkv,
)
from .attention import attention
from .terms import share_of

OP = "soft_causal_attention"


@Autocast(lower=("q", "k", "v")).applied
def soft_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax attention whose weights of later keys are multiplied by alpha after the softmax.

    .. math::
       out_i = \sum_j P_{ij}\,(\alpha + (1 - \alpha)\,[j \le i + S_k - S_q])\, v_j, \qquad
       P_i = \operatorname{softmax}_j(scale\; q_i \cdot k_j)

    alpha = 1 is attention to all keys. alpha = 0 is not causal attention: the weight of later keys
    is dropped, not redistributed. Computed from two passes, full and causal, and their lse:
    :math:`out = \alpha\,o^{full} + (1 - \alpha)\, e^{lse^{causal} - lse^{full}}\, o^{causal}`; the
    weight matrix is never materialised.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]``; Hk divides H.
        alpha: a finite number, annealed from 1 (no mask) to 0 during training; or a
            zero-dimensional tensor, which may require a gradient.
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q. Gradients: q, k, v, alpha.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: 3 B H Sq Sk (D + Dv) operations, 1.5 times :func:`attention`; memory linear in Sq
    and Sk.

    Paper: Adapting LLaMA Decoder to Vision Transformer (iLLaMA, Wang et al. 2024), section 3.2, the
    soft mask strategy.

    Example:
        >>> import torch, tokenmill as tm
        >>> x = torch.randn(1, 50, 4, 32)
        >>> out = tm.soft_causal_attention(x, x, x, 0.25)
        >>> torch.equal(tm.soft_causal_attention(x, x, x, 1.0), tm.attention(x, x, x))
        True
    """
    check_qkv(OP, q, k, v, 4, True)
    if isinstance(alpha, Tensor):
        check(alpha.dim() == 0, OP, "alpha", "must be a number or have no dimensions", alpha.dim())
        ok = alpha.is_floating_point()
        check(ok, OP, "alpha", "must be a floating-point tensor", alpha.dtype)
        check_device_of_q(OP, "alpha", alpha, q)
    else:
        alpha = as_number(OP, "alpha", alpha, "must be a number or a tensor")
        check_float32(OP, "alpha", alpha)
    full, full_lse = attention(q, k, v, scale=scale, return_lse=True, backend=backend)
    if isinstance(alpha, float) and alpha == 1:
        return full
    causal, causal_lse = attention(
        q, k, v, scale=scale, causal=True, return_lse=True, backend=backend
    )
    share = share_of(causal_lse, full_lse)
    wide = share.dtype
    weight = alpha.to(wide) if isinstance(alpha, Tensor) else alpha
    return torch.lerp(share * causal.to(wide), full.to(wide), weight).to(q.dtype)
