"""Foreground scores of Focus-DETR, and an encoder that processes foreground tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, check, check_device_of, check_dtype, check_tensor, fail, show
from ..dense.attention import attention
from ..tokens.gather_tokens import gather_tokens
from ..tokens.scatter_tokens import scatter_tokens
from ..tokens.topk_partition import topk_partition
from .focus import FocusSelect
from .rules import check_heads, check_input, stretching

SCORER, DUAL, ENCODER = "nn.FocusScorer", "nn.FocusDualAttention", "nn.FocusEncoder"
CASCADE = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)


class FocusScorer(nn.Module):
    r"""Foreground scores for the tokens of a feature pyramid, each level modulated by the score of
    the next coarser level:

    .. math::
       s_l = \operatorname{MLP}\big(x_l \odot (1 + \alpha_l \operatorname{up}(s_{l+1}))\big),

    from the coarsest level, which has no modulation, to the finest. Half of the hidden channels of
    the MLP are replaced by their mean over the level.

    Args:
        dim: channels C, a multiple of 4.
        num_levels: number of pyramid levels.

    Shape:
        levels, finest first, ``[B, Y, X, C]`` each, to ``[B, N]`` with N the sum of Y X, in the
        order of the levels, row-major; float16, bfloat16, float32. Padding is zeros, and counts in
        the means. :class:`FocusSelect` ignores the scores of padding.

    Weights: alpha ``[num_levels - 1]``, coarsest pair first, and enc_mask_predictor, as in
    the published transformer.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 3.25 C^2 operations per token.

    Paper: Focus-DETR (Zheng et al. 2023), section 3, top-down score modulation. Its input is the
    features with their positions, after a linear layer and a layer norm.

    Example:
        >>> import torch, tokenmill as tm
        >>> levels = [torch.randn(2, side, side, 32) for side in (16, 8, 4, 2)]
        >>> tm.nn.FocusScorer(32)(*levels).shape
        torch.Size([2, 340])
    """

    def __init__(self, dim: int = 256, num_levels: int = 4) -> None:
        super().__init__()
        dim, num_levels = as_int(SCORER, "dim", dim), as_int(SCORER, "num_levels", num_levels)
        whole = 4 <= dim < 2**31 and dim % 4 == 0
        check(whole, SCORER, "dim", "must be a positive multiple of 4", dim)
        check(num_levels >= 1, SCORER, "num_levels", "must be positive", num_levels)
        self.alpha = nn.Parameter(torch.empty(num_levels - 1).uniform_(-0.3, 0.3))
        self.enc_mask_predictor = MaskPredictor(dim)

    def forward(self, *levels: Tensor) -> Tensor:
        weight, channels = self.alpha, self.enc_mask_predictor.dim
        number = weight.shape[0] + 1
        check(len(levels) == number, SCORER, "levels", f"must be {number} maps", len(levels))
        for x in levels:
            check_input(SCORER, "levels", x, weight)
            shaped = x.dim() == 4 and x.shape[3] == channels
            rule = f"must have shape [B, Y, X, {channels}]"
            check(shaped, SCORER, "levels", rule, x.shape)
            if x.shape[0] != levels[0].shape[0] or 0 in x.shape[1:]:
                rule = f"must have the batch size of the first, {levels[0].shape[0]}, and pixels"
                fail(SCORER, "levels", rule, x.shape)
        scores = [self.enc_mask_predictor(levels[-1])]
        for x, alpha in zip(reversed(levels[:-1]), self.alpha, strict=True):
            above = scores[-1]
            rows, columns = (
                stretching(above.shape[axis], x.shape[axis], align_corners=True, like=above)
                for axis in (1, 2)
            )
            x = x + x * (rows @ above @ columns.mT)[..., None] * alpha
            scores.append(self.enc_mask_predictor(x.to(levels[0].dtype)))
        return torch.cat([s.flatten(1) for s in reversed(scores)], 1)


class MaskPredictor(nn.Module):
    """``[B, Y, X, C]`` to ``[B, Y, X]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layer1 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.layer2 = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
            nn.Linear(dim // 4, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        local, shared = self.layer1(x).chunk(2, 3)
        shared = shared.mean((1, 2), keepdim=True).expand_as(local)
        y: Tensor = self.layer2(torch.cat([local, shared], 3))[..., 0]
        return y


class FocusDualAttention(nn.Module):
    r"""Attention among the most informative foreground tokens, before an encoder layer: the tokens
    with the largest product of foreground score and maximum class logit. With positions p,

    .. math::
       x' = \operatorname{norm}(x + \operatorname{MHA}(x + p, x + p, x)),

    which replaces x for these tokens; the others are unchanged. The choice has no gradient.

    Args:
        dim: channels C.
        num_heads: number of heads, a divisor of the channels.
        topk: number of tokens that attend to each other; all where there are fewer.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x and positions ``[B, w, C]``, scores ``[B, w]``, classes ``[B, w, classes]``, and indices
        int32 ``[B, w]``, -1 for rows that are not tokens (None: all are), to ``[B, w, C]``.

    Weights: attn, with the names of torch.nn.MultiheadAttention, and norm2, a layer norm.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 8 C^2 + 4 C topk operations per selected token, and one selection.

    Paper: Focus-DETR (Zheng et al. 2023), section 3, dual attention: 300 tokens. There is no
    dropout.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.FocusDualAttention(32, num_heads=4, topk=10)
        >>> x, positions = torch.randn(2, 2, 50, 32)
        >>> layer(x, positions, torch.rand(2, 50), torch.randn(2, 50, 80)).shape
        torch.Size([2, 50, 32])
    """

    def __init__(
        self, dim: int = 256, num_heads: int = 8, topk: int = 300, *, backend: str | None = None
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(DUAL, dim, num_heads)
        topk = as_int(DUAL, "topk", topk)
        check(topk >= 1, DUAL, "topk", "must be positive", topk)
        self.num_heads, self.topk, self.backend = num_heads, topk, backend
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        scores: Tensor,
        classes: Tensor,
        indices: Tensor | None = None,
    ) -> Tensor:
        self._check(x, positions, scores, classes, indices)
        telling = (classes.amax(2) * scores).detach()
        maximum = min(self.topk, x.shape[1])
        if indices is None:
            chosen = topk_partition(telling, maximum, backend=self.backend)[0]
        else:
            there = indices >= 0
            count = there.sum(1).clamp(max=maximum)
            chosen = topk_partition(
                telling, count, max_k=maximum, valid=there, backend=self.backend
            )[0]
        tokens, places = gather_tokens((x, positions), chosen, backend=self.backend)
        asked = torch.cat([tokens + places, tokens], 2)
        q, k, v = self._projected(asked)
        out = attention(
            q, k, v, bias=None if indices is None else (chosen >= 0)[:, None, None],
            backend=self.backend,
        )  # fmt: skip
        tokens = self.norm2(tokens + self.attn.out_proj(out.flatten(2)))
        return scatter_tokens(tokens, chosen, x, backend=self.backend)

    def _projected(self, asked: Tensor) -> tuple[Tensor, ...]:
        weight, bias, dim = self.attn.in_proj_weight, self.attn.in_proj_bias, self.attn.embed_dim
        qk = F.linear(asked[..., :dim], weight[: 2 * dim], bias[: 2 * dim])
        v = F.linear(asked[..., dim:], weight[2 * dim :], bias[2 * dim :])
        heads = (self.num_heads, -1)
        return tuple(t.unflatten(2, heads) for t in (*qk.chunk(2, 2), v))

    def _check(
        self, x: Tensor, positions: Tensor, scores: Tensor, classes: Tensor, indices: Tensor | None
    ) -> None:
        check_input(DUAL, "x", x, self.norm2.weight)
        channels = self.attn.embed_dim
        shaped = x.dim() == 3 and x.shape[2] == channels
        check(shaped, DUAL, "x", f"must have shape [B, w, {channels}]", x.shape)
        for name, t, dims in (
            ("positions", positions, 3),
            ("scores", scores, 2),
            ("classes", classes, 3),
            ("indices", indices, 2),
        ):
            check_tensor(DUAL, name, t, optional=name == "indices")
            if t is None:
                continue
            check_device_of(DUAL, name, t, "x", x)
            if t.dim() != dims or t.shape[:2] != x.shape[:2]:
                rule = f"must have {dims} dimensions, the first two {show(x.shape[:2])}"
                fail(DUAL, name, rule, t.shape)
        check_input(DUAL, "positions", positions, self.norm2.weight)
        for name, t in (("scores", scores), ("classes", classes)):
            check_dtype(DUAL, name, t, float64=True)
        if positions.shape != x.shape:
            fail(DUAL, "positions", f"must have shape {show(x.shape)}", positions.shape)
        check(classes.shape[2] > 0, DUAL, "classes", "must have at least 1 class", classes.shape)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, topk={self.topk}"


class FocusEncoder(nn.Module):
    """The encoder of Focus-DETR: each layer processes fewer foreground tokens, the best first.

    A layer gathers its tokens (:class:`FocusSelect`), the most informative ones attend to each
    other (:class:`FocusDualAttention`), the given layer follows, and its rows are scattered back.

    Args:
        layers: modules that follow the dual attention in each encoder layer, called as
            ``layer(tokens, positions, *others, **shared)`` and returning the tokens; in the paper
            deformable attention to all tokens, a norm, a feed-forward network and a norm.
        class_head: module from tokens to class logits, e.g. a linear layer; the same for all
            layers.
        dim: channels C.
        num_heads: number of heads of the dual attention.
        topk: number of tokens of the dual attention.
        ratio: fraction of the tokens of an image that are foreground.
        cascade: fraction of the foreground tokens, per layer.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x and positions ``[B, N, C]``, scores ``[B, N]`` (:class:`FocusScorer`), valid bool ``[B,
        N]`` (None: all); others, tensors with a row per token, ``[B, N, ...]`` of up to 4
        dimensions (reference points), gathered like x, and shared, keywords passed to every layer
        unchanged (the maps that deformable attention samples from); to ``[B, N, C]``.

    Weights: dual (one per layer), layers, class_head.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: the layers on about 0.3 N tokens, on average by default.

    Paper: Focus-DETR (Zheng et al. 2023), section 3. Rows after the last token of an image, where
    images of a batch differ in size, are zeros here and take no part; published code fills them
    with background tokens of the image, which may be among the 300.

    Example:
        >>> import torch, tokenmill as tm
        >>> class Layer(torch.nn.Linear):
        ...     def forward(self, tokens, positions, points):
        ...         return tokens + super().forward(tokens + positions)
        >>> layers = [Layer(32, 32) for _ in range(6)]
        >>> encoder = tm.nn.FocusEncoder(layers, torch.nn.Linear(32, 80), 32, topk=20)
        >>> x, positions = torch.randn(2, 2, 340, 32)
        >>> encoder(x, positions, torch.randn(2, 340), None, torch.rand(2, 340, 4, 2)).shape
        torch.Size([2, 340, 32])
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        class_head: nn.Module,
        dim: int = 256,
        num_heads: int = 8,
        *,
        topk: int = 300,
        ratio: float = 0.5,
        cascade: Sequence[float] = CASCADE,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.select = FocusSelect(ratio, cascade, backend=backend)
        number = len(self.select.cascade)
        modules = isinstance(layers, Sequence | nn.ModuleList) and len(layers) == number
        rule = f"must be {number} modules, as cascade has shares"
        check(modules, ENCODER, "layers", rule, layers)
        head = isinstance(class_head, nn.Module)
        check(head, ENCODER, "class_head", "must be a module", class_head)
        self.layers, self.class_head = nn.ModuleList(layers), class_head
        self.dual = nn.ModuleList(
            FocusDualAttention(dim, num_heads, topk, backend=backend) for _ in range(number)
        )
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        scores: Tensor,
        valid: Tensor | None = None,
        *others: Tensor,
        **shared: Any,
    ) -> Tensor:
        check_tensor(ENCODER, "x", x)
        check(x.dim() == 3, ENCODER, "x", "must have 3 dimensions [B, N, C]", x.dim())
        check_tensor(ENCODER, "scores", scores)
        if scores.shape != x.shape[:2]:
            fail(ENCODER, "scores", f"must have shape {show(x.shape[:2])}", scores.shape)
        chosen = self.select(scores.detach(), valid)
        for number, (dual, layer) in enumerate(zip(self.dual, self.layers, strict=True)):
            indices = self.select.layer(chosen, number)
            tokens, places, foreground, *rest = gather_tokens(
                (x, positions, scores.detach(), *others), indices, backend=self.backend
            )
            tokens = dual(tokens, places, foreground, self.class_head(tokens), indices)
            tokens = layer(tokens, places, *rest, **shared)
            x = scatter_tokens(tokens, indices, x, backend=self.backend)
        return x
