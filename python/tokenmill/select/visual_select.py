"""visual_select: the image tokens that a language model gets, or keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import (
    as_int,
    check,
    check_bool,
    check_device_of,
    check_dtype,
    check_last_contiguous,
    check_qkv,
    check_tensor,
    fail,
)
from ..tokens.best_match import MAX_CHANNELS, best_match
from ..tokens.gather_tokens import gather_tokens
from ..tokens.merge_tokens import merge_tokens
from ..tokens.topk_partition import topk_partition
from .attention_column_scores import attention_column_scores
from .attention_row_scores import attention_row_scores

OP = "visual_select"
FEW_QUERIES = 16  # attention_row_scores holds an exponent of each pair of query and key in memory


def visual_select(
    x: Tensor,
    keep: int,
    *,
    scores: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
    image: tuple[int, int] | None = None,
    merge: int = 0,
    metric: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Keeps the image tokens that receive the most attention, drops the others or merges them into
    a few contextual tokens, and leaves tokens outside the image as they are.

    A token's score is the attention that it receives from the queries q, averaged over heads and
    queries; the matrix of weights is never materialised. With merge, every
    :math:`\lfloor R / merge \rfloor`-th of the R tokens that are not kept is a target, and each of
    the others goes to the target with the most similar metric:

    .. math::
       y_t = x_t + \frac{1}{|A_t|} \sum_{j \in A_t} x_j, \qquad
       A_t = \{ j : t = \operatorname{argmax}_{u} \cos(m_j, m_u) \}

    As in VisionZip's released code, :math:`y_t` is the target plus the mean of the tokens that go
    to it, not their average; a target without any is :math:`x_t`.

    Args:
        x: ``[B, N, C]`` float16, bfloat16 or float32 (float64 on the reference), any strides with a
            contiguous last dimension: features of a vision encoder, or hidden states of a language
            model.
        keep: number of image tokens to keep, 0 to their number M.
        scores: ``[B, M]`` float16, bfloat16 or float32 (float64 on the reference), the value of
            each image token, instead of q. NaN counts as -inf.
        q: ``[B, R, H, D]`` float16, bfloat16 or float32 (float64 on the reference), D up to 256,
            rotated as in the layer: the class token (``q[:, :1]``), the last token of the prompt
            (``q[:, -1:]``) or all tokens.
        k: ``[B, N, Hk, D]`` in the dtype of q, the keys of all rows of x, Hk a divisor of H.
        image: (begin, end) of the M image tokens among the rows of x, the same for all requests.
            None: all rows.
        merge: number of contextual tokens, 0 to M - keep. 0: the other tokens are dropped.
        metric: ``[B, N, Dm]`` float16, bfloat16 or float32 (float64 on the reference), Dm up to
            4096, for the similarity of tokens. None: the mean of k over heads.
        causal: q are the last rows, and row r sees keys j <= r + N - R.
        scale: factor of q.k; None = 1/sqrt(D).
        backend: "cpu", "cuda", "triton", "reference" or None (see :func:`tokenmill.explain`).

    Returns:
        (tokens ``[B, K, C]``, indices int32 ``[B, K]``) with K = N - M + keep + merge: the rows
        before the image, the kept tokens in image order, the contextual tokens likewise, the rows
        after the image. indices are rows of x, for a contextual token its target: gather position
        ids by them. Ties go to the lower index. Differentiable in x, but not in the choice.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 B H R N D operations for scores, twice that for more than 16 queries; 2 B merge
    (M - keep) Dm for merging; reads the rows of x that are used once and writes the result.

    Paper: VisionZip (Yang et al. 2024), section 3: query of the class token and keys in the
    second-last layer, whose output is x; 54 + 10, 108 + 20 or 162 + 30 of 577 tokens, where the
    first number counts the class token (keep does not). FastV (Chen et al. 2024), section 4: the
    query of the last token in layer K - 1, from 0, whose output is x; K = 2, half of the image
    tokens. Its text averages over all queries, its released code takes the last one. VTC-CLS (Wang
    et al. 2024): scores summed over layers (:class:`tokenmill.nn.ClsTokenPruning`).

    Example:
        >>> import torch, tokenmill as tm
        >>> x, (q, k) = torch.randn(1, 577, 1024), torch.randn(2, 1, 577, 16, 64)
        >>> tokens, indices = tm.visual_select(x, 53, q=q[:, :1], k=k, image=(1, 577), merge=10)
        >>> tokens.shape, indices[0, 0].item()  # the class token, 53 kept and 10 contextual ones
        (torch.Size([1, 64, 1024]), 0)
    """
    keep, merge = as_int(OP, "keep", keep, minimum=0), as_int(OP, "merge", merge, minimum=0)
    begin, end = _check_image(x, keep, image, merge)
    _check_attention(x, scores, q, k, causal)
    metric = _metric_of(x, k, metric) if merge else None
    if scores is None:
        assert q is not None and k is not None
        scores = _attention_received(q, k, causal, scale, backend)[:, begin:end]
    elif list(scores.shape) != [x.shape[0], end - begin]:
        rule = f"must have shape [{x.shape[0]}, {end - begin}], a score for each image token"
        fail(OP, "scores", rule, scores.shape)
    kept, rest = topk_partition(scores.detach(), keep, order="index", backend=backend)
    kept, rest = kept + begin, rest + begin
    rows = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand(x.shape[0], -1)
    if metric is None:
        indices = torch.cat([rows[:, :begin], kept, rows[:, end:]], 1)
        return gather_tokens(x, indices, backend=backend), indices
    targets, others = _targets_and_others(rest, merge)
    nearest, _ = best_match(
        gather_tokens(metric, others, backend=backend),
        gather_tokens(metric, targets, backend=backend),
        normalize=True, backend=backend,
    )  # fmt: skip
    assign = torch.full_like(rows, -1).scatter(1, others.long(), nearest)
    means, _ = merge_tokens(x, assign, merge, backend=backend)
    indices = torch.cat([rows[:, :begin], kept, targets, rows[:, end:]], 1)
    tokens = gather_tokens(x, indices, backend=backend)
    first, last = begin + keep, begin + keep + merge
    merged = tokens[:, first:last] + means
    return torch.cat([tokens[:, :first], merged, tokens[:, last:]], 1), indices


def _targets_and_others(rest: Tensor, merge: int) -> tuple[Tensor, Tensor]:
    """[B, merge] and [B, R - merge]: the first of each of merge groups of equal size, and what else
    is in the groups or after them.
    """
    size = rest.shape[1] // merge
    groups = rest[:, : merge * size].unflatten(1, (merge, size))
    others = torch.cat([groups[:, :, 1:].flatten(1), rest[:, merge * size :]], 1)
    return groups[:, :, 0].contiguous(), others


def _attention_received(
    q: Tensor, k: Tensor, causal: bool, scale: float | None, backend: str | None
) -> Tensor:
    """float32 [B, N]: the mean over heads and queries of the attention to each key."""
    q, k = q.detach(), k.detach()
    if q.shape[1] <= FEW_QUERIES:
        return attention_row_scores(q, k, scale=scale, causal=causal, backend=backend)
    scores = attention_column_scores(
        q, k, causal=causal, reduce="mean", scale=scale, backend=backend
    )
    return scores.mean(1)


def _metric_of(x: Tensor, k: Tensor | None, metric: Tensor | None) -> Tensor:
    if metric is None:
        if k is None:
            fail(OP, "metric", "must be given with merge where k is None", metric)
        k = k.detach()
        return k.mean(2, dtype=torch.promote_types(k.dtype, torch.float32))
    check_tensor(OP, "metric", metric)
    fits = metric.dim() == 3 and metric.shape[:2] == x.shape[:2]
    check(fits, OP, "metric", f"must have shape [{x.shape[0]}, {x.shape[1]}, Dm]", metric.shape)
    check_dtype(OP, "metric", metric, float64=True)
    check_last_contiguous(OP, "metric", metric)
    check_device_of(OP, "metric", metric, "x", x)
    channels = metric.shape[2]
    rule = f"must have 1 to {MAX_CHANNELS} channels"
    check(1 <= channels <= MAX_CHANNELS, OP, "metric", rule, channels)
    return metric.detach()


def _check_image(
    x: Tensor, keep: int, image: tuple[int, int] | None, merge: int
) -> tuple[int, int]:
    check_tensor(OP, "x", x)
    check(x.dim() == 3, OP, "x", "must have 3 dimensions [B, N, C]", x.dim())
    check_dtype(OP, "x", x, float64=True)
    check_last_contiguous(OP, "x", x)
    begin, end = 0, x.shape[1]
    if image is not None:
        rule = "must be two ints (begin, end) or None"
        if not (isinstance(image, tuple | list) and len(image) == 2):
            fail(OP, "image", rule, image)
        begin, end = (as_int(OP, "image", place, rule) for place in image)
        ok = 0 <= begin <= end <= x.shape[1]
        check(ok, OP, "image", f"must be 0 <= begin <= end <= {x.shape[1]}", [begin, end])
    tokens = end - begin
    if keep > tokens:
        fail(OP, "keep", f"must be at most the number of image tokens, {tokens}", keep)
    if merge > tokens - keep:
        rule = f"must be at most the number of image tokens that are not kept, {tokens - keep}"
        fail(OP, "merge", rule, merge)
    return begin, end


def _check_attention(
    x: Tensor, scores: Tensor | None, q: Tensor | None, k: Tensor | None, causal: bool
) -> None:
    check_bool(OP, "causal", causal)
    if (scores is None) == (q is None):
        fail(OP, "scores", "must be given without q, or q without them", scores)
    if scores is not None:
        check_tensor(OP, "scores", scores)
        check_dtype(OP, "scores", scores, float64=True)
        check_last_contiguous(OP, "scores", scores)
        check_device_of(OP, "scores", scores, "x", x)
    if k is not None:
        check_tensor(OP, "k", k)
        fits = k.dim() == 4 and k.shape[:2] == x.shape[:2]
        rule = f"must have shape [{x.shape[0]}, {x.shape[1]}, Hk, D], a key for each row of x"
        check(fits, OP, "k", rule, k.shape)
        check_device_of(OP, "k", k, "x", x)
    if q is not None:
        if k is None:
            fail(OP, "k", "must be given with q", k)
        check_qkv(OP, q, k, k, 4, True)
