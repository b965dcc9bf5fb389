"""paint_tokens: local and summary tokens of an image, from the attention of its class token."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import (
    as_number,
    check,
    check_device_of,
    check_dtype,
    check_tensor,
    fail,
    show,
)
from .topk_select import MAX_K, topk_select

OP = "paint_tokens"


def paint_tokens(
    first_scores: Tensor,
    late_scores: Tensor,
    *,
    local_share: float = 0.25,
    whisker: float = 1.5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Local and summary tokens among the N patches of an image.

    Summary tokens are the outliers of late_scores, values above
    :math:`Q_3 + whisker\,(Q_3 - Q_1)` with quartiles interpolated linearly. Local tokens are the
    ``int(local_share N)`` largest of first_scores, excluding the summary tokens.

    Args:
        first_scores: ``[B, N]`` float16, bfloat16 or float32 (float64 on the reference), the
            attention that the class token gives to each patch in the first layer of the vision
            encoder, as a sum or a mean over heads: :func:`attention_row_scores` with skip=1, or row
            0 of a matrix of weights.
        late_scores: ``[B, N]`` likewise, from the second-last layer.
        local_share: fraction of the patches, 0 to 1.
        whisker: distance above the third quartile at which outliers begin, in interquartile ranges;
            nonnegative.
        backend: backend of :func:`topk_select` (see :func:`tokenmill.explain`).

    Returns:
        (local, summary), bool ``[B, N]``, with no token in both. Ties go to the lower position. NaN
        is never chosen. Not differentiable.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: sorts late_scores; reads first_scores once.

    Paper: Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language
    Model (PAINT, Arif et al. 2025), section 4, whose released code has these defaults. It takes
    float16 scores of the first image of a batch; here each image has its own.

    Example:
        >>> import torch, tokenmill as tm
        >>> first = torch.arange(8.0)[None]
        >>> late = torch.tensor([[1.0, 2, 1, 2, 1, 2, 1, 90]])
        >>> local, summary = tm.paint_tokens(first, late)
        >>> local.nonzero()[:, 1].tolist(), summary.nonzero()[:, 1].tolist()
        ([6], [7])
    """
    share, reach = _check(first_scores, late_scores, local_share, whisker)
    first, late = first_scores.detach(), late_scores.detach()
    batch, tokens = first.shape
    count = min(int(share * tokens), MAX_K)
    if tokens == 0 or batch == 0:
        return (torch.zeros_like(first, dtype=torch.bool),) * 2
    # resolve_neg: torch.quantile of torch 2.15 ignores the negative bit of a view.
    late = late.resolve_neg().to(torch.promote_types(late.dtype, torch.float32))
    quarters = torch.tensor((0.25, 0.75), dtype=late.dtype, device=late.device)
    low, high = torch.quantile(late, quarters, 1)
    summary = late > (high + reach * (high - low))[:, None]
    if count == 0:
        return torch.zeros_like(summary), summary
    indices, _ = topk_select(first, count, backend=backend)
    # Padding entries -1 of the lists are redirected to the extra column N.
    places = torch.where(indices < 0, tokens, indices).long()
    local = summary.new_zeros(batch, tokens + 1).scatter(1, places, True)[:, :tokens]
    return local & ~summary, summary


def _check(first: Tensor, late: Tensor, local_share: float, whisker: float) -> tuple[float, float]:
    for name, t in (("first_scores", first), ("late_scores", late)):
        check_tensor(OP, name, t)
        check(t.dim() == 2, OP, name, "must have 2 dimensions [B, N]", t.dim())
        check_dtype(OP, name, t, float64=True)
    if late.shape != first.shape:
        rule = f"must have the shape of first_scores, {show(first.shape)}"
        fail(OP, "late_scores", rule, late.shape)
    check_device_of(OP, "late_scores", late, "first_scores", first)
    share = as_number(OP, "local_share", local_share)
    check(0 <= share <= 1, OP, "local_share", "must be 0 to 1", share)
    reach = as_number(OP, "whisker", whisker)
    check(0 <= reach < torch.inf, OP, "whisker", "must be finite and not negative", reach)
    return share, reach
