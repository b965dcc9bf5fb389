"""Token-aware pooling and the attention diversification loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._check import (
    as_int,
    as_number,
    check,
    check_device_of,
    check_dtype,
    check_tensor,
    fail,
    show,
)
from ..tokens.local_pool import local_pool
from .rules import check_input

POOLING, LOSS = "nn.TokenAwarePooling", "nn.AttentionDiversificationLoss"


class TokenAwarePooling(nn.Module):
    r"""Mixes each token of a map with neighbourhoods of several sizes, with per-token weights,
    before an attention layer, so that attention does not depend on a few tokens:

    .. math::
       m = \operatorname{softmax}\big(\operatorname{Conv}(\operatorname{BN}(\operatorname{Conv}(x)))
           / \tau\big), \qquad
       y = m_0\, x + \sum_{k=1}^{K-1} m_k\, \operatorname{avg}_{3 \times 3}^{(k)}(x),

    with the mean over a 3x3 window with dilation k. Cells beyond the edge count as zeros.

    Args:
        dim: channels C.
        num_scales: K, the identity and K - 1 dilations.
        temperature: :math:`\tau`.
        backend: backend of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, Y, X, C]`` to ``[B, Y, X, C]``; float16, bfloat16, float32.

    Weights: proj.0 ``[K, C, 3, 3]``, proj.1 (batch norm of K channels) and proj.2 ``[K, K, 3, 3]``,
    as in the dilation predictor of the published blocks, whose state dict loads unchanged.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 18 C K operations per token for the weights, and K - 1 passes of
    :func:`tokenmill.local_pool`.

    Paper: Robustifying Token Attention (Guo et al. 2023), section 3; 4 scales.

    Example:
        >>> import torch, tokenmill as tm
        >>> tm.nn.TokenAwarePooling(64)(torch.randn(2, 14, 14, 64)).shape
        torch.Size([2, 14, 14, 64])
    """

    def __init__(
        self,
        dim: int,
        num_scales: int = 4,
        *,
        temperature: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_scales = as_int(POOLING, "dim", dim), as_int(POOLING, "num_scales", num_scales)
        check(1 <= dim < 2**31, POOLING, "dim", "must be 1 to 2^31 - 1", dim)
        rule = "must be 1 to 65536"
        check(1 <= num_scales <= 2**16, POOLING, "num_scales", rule, num_scales)
        temperature = as_number(POOLING, "temperature", temperature)
        check(temperature > 0, POOLING, "temperature", "must be positive", temperature)
        self.num_scales, self.temperature, self.backend = num_scales, temperature, backend
        self.proj = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_scales),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.proj[0]
        assert isinstance(first, nn.Conv2d)
        check_input(POOLING, "x", x, first.weight)
        channels = first.in_channels
        shaped = x.dim() == 4 and x.shape[3] == channels
        check(shaped, POOLING, "x", f"must have shape [B, Y, X, {channels}]", x.shape)
        if x.numel() == 0:
            return x.new_zeros(x.shape)
        mixed = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) / self.temperature
        shares = torch.softmax(mixed, 3).to(x.dtype)
        y = shares[..., :1] * x
        for k in range(1, self.num_scales):
            pooled = local_pool(x, 3, dilation=k, count_include_pad=True, backend=self.backend)
            y = y + shares[..., k : k + 1] * pooled
        return y

    def extra_repr(self) -> str:
        return f"num_scales={self.num_scales}, temperature={self.temperature}"


class AttentionDiversificationLoss(nn.Module):
    r"""Similarity of the rows of attention: the mean cosine between each row and the mean row.

    Rows are means over the heads. Weights of at most threshold / N count as 0, in the rows and in
    the mean row, and the result is the mean over rows, sequences and layers.

    Args:
        threshold: in units of 1 / N, the weight in a uniform row.

    Shape:
        maps, one per layer, ``[B, N, N]``, weights averaged over heads, as computed by
        :meth:`mean_map` from queries and keys; to a scalar.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: reads each map three times.

    Paper: Robustifying Token Attention (Guo et al. 2023), section 3: threshold 2, added to the task
    loss with factor 1.

    Example:
        >>> import torch, tokenmill as tm
        >>> loss = tm.nn.AttentionDiversificationLoss()
        >>> layers = [torch.randn(2, 2, 49, 3, 16) for _ in range(4)]
        >>> 0 <= loss(*(loss.mean_map(q, k) for q, k in layers)).item() <= 1
        True
    """

    def __init__(self, threshold: float = 2.0) -> None:
        super().__init__()
        self.threshold = as_number(LOSS, "threshold", threshold)

    def forward(self, *maps: Tensor) -> Tensor:
        check(len(maps) > 0, LOSS, "maps", "must be at least one tensor", len(maps))
        return torch.stack([self._layer(each, maps[0]) for each in maps]).mean()

    def _layer(self, rows: Tensor, first: Tensor) -> Tensor:
        check_tensor(LOSS, "maps", rows)
        check_dtype(LOSS, "maps", rows, float64=True)
        check_device_of(LOSS, "maps", rows, "the first map", first)
        square = rows.dim() == 3 and rows.shape[1] == rows.shape[2] and rows.numel() > 0
        check(square, LOSS, "maps", "must have shape [B, N, N], none of them 0", rows.shape)
        minimum = self.threshold / rows.shape[2]
        mean = rows.mean(1, keepdim=True)
        rows, mean = (torch.where(t > minimum, t, 0) for t in (rows, mean))
        return F.cosine_similarity(mean, rows, dim=2).mean()

    @staticmethod
    def mean_map(q: Tensor, k: Tensor, *, scale: float | None = None, tile: int = 128) -> Tensor:
        """The mean over the heads of softmax(scale q k^T), ``[B, N, N]``, of q and k ``[B, N, H,
        D]``. Rows are computed `tile` at a time, and recomputed in the backward, so that the
        weights of all heads are never in memory together. scale None: 1 / sqrt(D)."""
        for name, t in (("q", q), ("k", k)):
            check_tensor(LOSS, name, t)
            check(t.dim() == 4, LOSS, name, "must have 4 dimensions [B, N, H, D]", t.dim())
            check_dtype(LOSS, name, t, float64=True)
            check_device_of(LOSS, name, t, "q", q)
        if k.shape != q.shape or k.dtype != q.dtype:
            rule = f"must have shape and dtype of q, {show(q.shape)} {show(q.dtype)}"
            fail(LOSS, "k", rule, [*k.shape, k.dtype])
        tile = as_int(LOSS, "tile", tile)
        check(tile >= 1, LOSS, "tile", "must be positive", tile)
        scale = q.shape[3] ** -0.5 if scale is None else as_number(LOSS, "scale", scale)
        parts = [checkpoint(_mean_rows, rows, k, scale, use_reentrant=False)
                 for rows in q.split(tile, 1)]  # fmt: skip
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


def _mean_rows(q: Tensor, k: Tensor, scale: float) -> Tensor:
    logits = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    return torch.softmax(logits, 3, dtype=torch.promote_types(q.dtype, torch.float32)).mean(1)
