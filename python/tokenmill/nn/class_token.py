"""Reorganises (EViT) or prunes (VTC-CLS) patches by the attention of the class token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._call.autocast import Autocast
from .._call.autograd import transformed
from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_dtype,
    check_qkv,
    check_tensor,
    fail,
)
from .._lowering import scale_or_default
from ..select.attention_row_scores import attention_row_scores
from ..select.visual_select import visual_select
from ..tokens.gather_fuse import gather_fuse
from ..tokens.gather_tokens import gather_tokens
from ..tokens.topk_partition import topk_partition

EVIT, PRUNING, SCORES = "nn.EViTReorganize", "nn.ClsTokenPruning", "nn.class_scores"


@Autocast(lower=("q", "k")).applied
def class_scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """The attention of token 0 to each other token: the mean over heads of probabilities over all
    tokens.

    Args:
        q, k: ``[B, 1 + N, H, D]`` and ``[B, 1 + N, Hk, D]``; only token 0 of q is read.
        scale: factor of q.k; None = 1/sqrt(D).
        backend: backend of :func:`tokenmill.attention_row_scores`. Where a gradient is needed,
            which that operator does not have, plain PyTorch is used.

    Returns:
        float32 ``[B, N]``.
    """
    for name, t in (("q", q), ("k", k)):
        check_tensor(SCORES, name, t)
        check(t.dim() == 4, SCORES, name, "must have 4 dimensions [B, 1 + N, H, D]", t.dim())
        check(t.shape[1] >= 1, SCORES, name, "must begin with a class token; tokens", t.shape[1])
    first = q[:, :1]
    # Tensors under torch.func.vmap do not report that they require a gradient.
    derived = not torch.compiler.is_compiling() and transformed()
    derived = derived or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    if not derived:
        return attention_row_scores(first, k, scale=scale, skip=1, backend=backend)
    check_qkv(SCORES, first, k, k, 4, True)
    factor = scale_or_default(SCORES, scale, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    z = torch.einsum("bhd,bnhd->bhn", first[:, 0].to(wide), keys.to(wide))
    return torch.softmax(factor * z, -1).mean(1)[:, 1:]


class EViTReorganize(nn.Module):
    r"""Applied after the attention of a block: keeps the patches to which the class token attends
    most, and fuses the others into one token,

    .. math::
       y = [x_0;\ x_{top};\ f], \qquad f = \sum_{j \notin top} a_j x_j.

    Args:
        keep_rate: fraction of the patches to keep, rounded up.
        tokens: number of patches to keep instead; None = by the rate.
        fuse: whether to append f.
        normalize: divide f by the sum of its weights, unlike the published models.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, 1 + N, C]`` and scores ``[B, N]`` (:meth:`scores`, or row 0 of an attention map,
        averaged over the heads) to (y ``[B, 1 + K + 1, C]``, keep int32 ``[B, K]``): the kept
        patches, greatest score first, in the order of y. If all are kept, y is x, without f.
        keep_rate and tokens of a call override the arguments of the layer
        (:func:`keep_rate_schedule`); tokens take precedence over a rate.

    Gradients flow through x and through the scores in f, as in the published models, but not
    through the choice: the score of a kept patch gets none. :meth:`scores` has a gradient (in plain
    PyTorch; :func:`tokenmill.attention_row_scores` has none).

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads x once and writes y.

    Paper: EViT (Liang et al. 2022), section 3.2: keep_rate 0.5 to 0.9 in layers 3, 6 and 9 of 12
    (from 0), as in :class:`EViTEncoder`. The released code takes the scores after the dropout of
    the attention map, which is 0 there.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.EViTReorganize(keep_rate=0.7)
        >>> x, q, k = torch.randn(2, 197, 384), *torch.randn(2, 2, 197, 6, 64)
        >>> y, keep = layer(x, layer.scores(q, k))
        >>> y.shape, keep.shape
        (torch.Size([2, 140, 384]), torch.Size([2, 138]))
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        *,
        tokens: int | None = None,
        fuse: bool = True,
        normalize: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.keep_rate, self.tokens = _kept(EVIT, keep_rate, tokens)
        for name, flag in (("fuse", fuse), ("normalize", normalize)):
            check_bool(EVIT, name, flag)
        self.fuse, self.normalize, self.backend = fuse, normalize, backend

    def scores(self, q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
        """float32 ``[B, N]`` of q and k ``[B, 1 + N, H, D]``; see :func:`class_scores`."""
        return class_scores(q, k, scale=scale, backend=self.backend)

    def forward(
        self,
        x: Tensor,
        scores: Tensor,
        keep_rate: float | None = None,
        tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        _check_scores(EVIT, x, scores)
        patches = scores.shape[1]
        if tokens is None and keep_rate is None:
            tokens = self.tokens
        rate, tokens = _kept(EVIT, self.keep_rate if keep_rate is None else keep_rate, tokens)
        count = math.ceil(rate * patches) if tokens is None else tokens
        if count > patches:
            fail(EVIT, "tokens", f"must be at most the number of patches, {patches}", count)
        if count == patches:
            every = torch.arange(patches, dtype=torch.int32, device=x.device)
            return x, every.expand(x.shape[0], -1)
        keep, rest = topk_partition(scores, count, backend=self.backend)
        if self.fuse:
            y = gather_fuse(x, keep, rest, scores, normalize=self.normalize, backend=self.backend)
        else:
            first = torch.zeros_like(keep[:, :1])
            y = gather_tokens(x, torch.cat([first, keep + 1], 1), backend=self.backend)
        return y, keep

    def extra_repr(self) -> str:
        kept = f"keep_rate={self.keep_rate}" if self.tokens is None else f"tokens={self.tokens}"
        return f"{kept}, fuse={self.fuse}, normalize={self.normalize}"


class ClsTokenPruning(nn.Module):
    """Selects the image tokens for a language model: the patches to which the class token of the
    vision encoder attends most, summed over layers, in image order.

    Args:
        keep: number of patches to keep.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, 1 + N, C]``, the features of a layer, and scores ``[B, N]`` of several layers (a
        sequence, or their sum) to (patches ``[B, keep, C]``, indices int32 ``[B, keep]``,
        ascending). The class token is not included.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads and writes keep rows.

    Paper: VTC-CLS (Wang et al. 2024), section 3: all layers from a chosen one on except the last,
    64 to 192 of 576 patches.

    Example:
        >>> import torch, tokenmill as tm
        >>> prune = tm.nn.ClsTokenPruning(keep=64)
        >>> layers = [torch.randn(2, 1, 577, 16, 64) for _ in range(3)]
        >>> scores = [prune.scores(q, k) for q, k in layers]
        >>> patches, indices = prune(torch.randn(1, 577, 1024), scores)
        >>> patches.shape, bool((indices.diff() > 0).all())
        (torch.Size([1, 64, 1024]), True)
    """

    def __init__(self, keep: int, *, backend: str | None = None) -> None:
        super().__init__()
        keep = as_int(PRUNING, "keep", keep, minimum=0)
        self.keep, self.backend = keep, backend

    def scores(self, q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
        """float32 ``[B, N]`` of q and k ``[B, 1 + N, H, D]``; see :func:`class_scores`."""
        return class_scores(q, k, scale=scale, backend=self.backend)

    def forward(self, x: Tensor, scores: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if not isinstance(scores, Tensor):
            some = isinstance(scores, Sequence) and len(scores) > 0
            check(some, PRUNING, "scores", "must be a tensor or several", scores)
            for layer in scores:
                check_tensor(PRUNING, "scores", layer)
                check_dtype(PRUNING, "scores", layer, float64=True)
                alike = layer.shape == scores[0].shape and layer.device == scores[0].device
                check(alike, PRUNING, "scores", "must be alike in every layer", layer.shape)
            scores = torch.stack(list(scores)).sum(0)
        _check_scores(PRUNING, x, scores)
        patches = scores.shape[1]
        if self.keep > patches:
            fail(PRUNING, "keep", f"must be at most the number of patches, {patches}", self.keep)
        return visual_select(x[:, 1:], self.keep, scores=scores, backend=self.backend)

    def extra_repr(self) -> str:
        return f"keep={self.keep}"


def _kept(name: str, keep_rate: float, tokens: int | None) -> tuple[float, int | None]:
    """Number of patches to keep, from a rate or a number."""
    keep_rate = as_number(name, "keep_rate", keep_rate)
    check(0 < keep_rate <= 1, name, "keep_rate", "must be above 0 and at most 1", keep_rate)
    if tokens is not None:
        tokens = as_int(name, "tokens", tokens, "must be an integer or None")
        check(tokens >= 1, name, "tokens", "must be at least 1", tokens)
    return keep_rate, tokens


def _check_scores(name: str, x: Tensor, scores: Tensor) -> None:
    check_tensor(name, "x", x)
    check_tensor(name, "scores", scores)
    shaped = x.dim() == 3 and x.shape[1] >= 1
    check(shaped, name, "x", "must have shape [B, 1 + N, C]", x.shape)
    wanted = [x.shape[0], x.shape[1] - 1]
    if list(scores.shape) != wanted:
        fail(name, "scores", f"must have shape {wanted}, a score for each patch", scores.shape)
