"""amplified_attention: logits of the last queries raised in proportion to their magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from .._call.autocast import Autocast
from .._check import (
    as_int,
    check,
    check_bool,
    check_device_of_q,
    check_qkv,
    check_tensor,
    fail,
    is_any,
    reads_values,
)
from .._lowering import scale_or_default
from .attention import attention

OP = "amplified_attention"


@Autocast(lower=("q", "k", "v")).applied
def amplified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gains: Tensor,
    *,
    rows: int = 1,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax attention that raises the logits of chosen keys in the last rows.

    With :math:`z_{ij} = scale\; q_i \cdot k_j`, the last `rows` queries have

    .. math::
       P_i = \operatorname{softmax}_j(z_{ij} + g_j\, |z_{ij}|)

    and the others plain softmax attention. The gain acts on the logit before the softmax, so a key
    with a negative logit rises too. For factors on the weights after the softmax see
    :func:`reweighted_attention`.

    Args:
        q: ``[B, Sq, H, D]`` float16, bfloat16 or float32 (float64 on the reference), any strides
            with a contiguous last dimension, D up to 256.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]``; Hk divides H (GQA).
        gains: ``[B | 1, H | 1, Sk]``, the gain g of each key, finite, 0 for unchanged keys; H
            counts query heads. float32 or the dtype of q.
        rows: number of last queries to change, at least 1; more than Sq means all.
        causal: query i sees keys j <= i + Sk - Sq (bottom-right aligned).
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        out ``[B, Sq, H, Dv]`` in the dtype of q. A query with no visible key has out 0. Gradients:
        q, k, v, gains.

    Raises:
        RuntimeError: naming argument, rule and value, before anything runs.

    Complexity: one :func:`attention`, and 2 B H rows Sk D operations for the logits of the last
    rows, which read the keys a second time; B H rows Sk logits are held in memory.

    Paper: Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language
    Model (PAINT, Arif et al. 2025), section 4: g = 0.7 for local and 0.3 for summary tokens
    (:func:`paint_tokens`), in layers 2 to 31 of 32 (from 0), for the last query of the prompt and
    of each step; Paying More Attention to Image (PAI, Liu et al. 2024): one g for all tokens of the
    image.

    Example:
        >>> import torch, tokenmill as tm
        >>> first, late = torch.rand(2, 1, 36)  # attention of the class token to 36 patches
        >>> local, summary = tm.paint_tokens(first, late)
        >>> gains = torch.nn.functional.pad(0.7 * local + 0.3 * summary, (5, 9))  # 5 tokens before
        >>> q, k, v = (torch.randn(1, 50, 4, 32) for _ in range(3))
        >>> tm.amplified_attention(q, k, v, gains[:, None], causal=True).shape
        torch.Size([1, 50, 4, 32])
    """
    rows = _check(q, k, v, gains, rows, causal)
    before = max(q.shape[1] - rows, 0)
    last = q[:, before:]
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = _logits(last.to(wide), k.to(wide), scale_or_default(OP, scale, q))
    raised = attention(
        last, k, v, bias=gains.to(wide)[:, :, None] * logits.abs(), scale=scale, causal=causal,
        backend=backend,
    )  # fmt: skip
    if before == 0:
        return raised
    # Without the last rows, the keys that only they can see are dropped too.
    seen = max(k.shape[1] - last.shape[1], 0) if causal else k.shape[1]
    plain = attention(
        q[:, :before], k[:, :seen], v[:, :seen], scale=scale, causal=causal, backend=backend
    )
    return torch.cat((plain, raised), 1)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Logits [B, H, rows, Sk] of q [B, rows, H, D] and k [B, Sk, Hk, D], without expanding k."""
    groups = q.unflatten(2, (k.shape[2], q.shape[2] // max(k.shape[2], 1)))
    return (torch.einsum("brhgd,bjhd->bhgrj", groups, k) * scale).flatten(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, gains: Tensor, rows: int, causal: bool) -> int:
    for name, t in (("q", q), ("k", k), ("v", v), ("gains", gains)):
        check_tensor(OP, name, t)
    check_qkv(OP, q, k, v, 4, True)
    rows = as_int(OP, "rows", rows, minimum=1)
    check_bool(OP, "causal", causal)
    batch, heads, keys = q.shape[0], q.shape[2], k.shape[1]
    shape = tuple(gains.shape)
    if len(shape) != 3 or not (is_any(shape[0], 1, batch) and is_any(shape[1], 1, heads)):
        fail(OP, "gains", f"must have shape [{batch} or 1, {heads} or 1, {keys}]", shape)
    check(shape[2] == keys, OP, "gains", f"must have {keys} columns, one for each key", shape[2])
    ok = gains.dtype in (q.dtype, torch.promote_types(q.dtype, torch.float32))
    check(ok, OP, "gains", "must be in float32 or the dtype of q", gains.dtype)
    check_device_of_q(OP, "gains", gains, q)
    if reads_values(gains) and gains.numel():
        ok = bool(gains.detach().isfinite().all())
        check(ok, OP, "gains", "must be finite", gains)
    return rows
