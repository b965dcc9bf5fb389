"""Token merging."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._check import (
    as_int,
    as_number,
    check,
    check_bool,
    check_device_of,
    check_dtype,
    check_tensor,
    fail,
)
from ..tokens.bipartite_match import bipartite_match
from ..tokens.merge_tokens import merge_tokens, unmerge_tokens

NAME = "nn.TokenMerging"


class TokenMerging(nn.Module):
    r"""A merging step of ToMe, between the attention and the MLP of a block: the r tokens most
    similar to a token of the other half are merged into it.

    Rows are means over the tokens that they represent; their number is the size of a row. To weight
    merged rows proportionally in attention, log(size) is added to the logits of a key
    (:meth:`attention_bias`).

    Args:
        r: number of tokens to merge in this block; at most half of the unprotected tokens are
            merged.
        class_token: token 0 is not merged.
        distill_token: nothing is merged into token 1.
        threshold: pairs with a smaller cosine are not merged; sequences then use different numbers
            of rows, and unused rows have size 0.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]``; metric ``[B, N, D]``, or keys ``[B, N, H, D]``, averaged over heads; size
        float32 ``[B, N]`` (None: 1); source int32 ``[B, N0]`` (None: the N tokens of x) to (x ``[B,
        N - r, C]``, size ``[B, N - r]``, source ``[B, N0]``), where source is the row of each
        original token. The class token stays row 0, the distillation token row 1. Gradients flow
        through x; the choice has none.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 2 (N / 2)^2 D operations per sequence; reads x once.

    Paper: ToMe (Bolya et al. 2023), section 3. Its image models merge 8 to 23 tokens per block.

    Example:
        >>> import torch, tokenmill as tm
        >>> merge = tm.nn.TokenMerging(r=13)
        >>> x, keys = torch.randn(2, 197, 384), torch.randn(2, 197, 6, 64)
        >>> y, size, source = merge(x, keys)
        >>> y.shape, size.sum(1).tolist()
        (torch.Size([2, 184, 384]), [197.0, 197.0])
        >>> q, k, v = torch.randn(3, 2, 184, 6, 64)
        >>> out = tm.attention(q, k, v, bias=merge.attention_bias(size))
        >>> merge.unmerge(y, source).shape
        torch.Size([2, 197, 384])
    """

    def __init__(
        self,
        r: int,
        *,
        class_token: bool = True,
        distill_token: bool = False,
        threshold: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        r = as_int(NAME, "r", r, minimum=0)
        for name, flag in (("class_token", class_token), ("distill_token", distill_token)):
            check_bool(NAME, name, flag)
        if threshold is not None:
            threshold = as_number(NAME, "threshold", threshold)
        needs = class_token or not distill_token
        check(needs, NAME, "distill_token", "requires class_token", distill_token)
        self.r, self.class_token, self.distill_token = r, class_token, distill_token
        self.threshold, self.backend = threshold, backend

    def forward(
        self, x: Tensor, metric: Tensor, size: Tensor | None = None, source: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(x, metric, size, source)
        if size is None:
            size = torch.ones(x.shape[:2], device=x.device)
        if source is None:
            every = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
            source = every.expand(x.shape[0], -1)
        if self.r == 0:
            return x, size, source
        if metric.dim() == 4:
            metric = metric.mean(2)
        assign, rows, _ = bipartite_match(
            metric, self.r, protect_first=int(self.class_token),
            protect_targets=int(self.distill_token), threshold=self.threshold,
            backend=self.backend,
        )  # fmt: skip
        if self.distill_token and x.shape[1] > 1:
            at = assign[:, 1:2]  # the first destination, after the remaining sources
            assign = torch.where(assign == at, 1, assign + ((assign >= 1) & (assign < at)))
        y, size = merge_tokens(x, assign, rows, weight=size, backend=self.backend)
        return y, size, assign.gather(1, source.long())

    def _check(self, x: Tensor, metric: Tensor, size: Tensor | None, source: Tensor | None) -> None:
        for name, t in (("x", x), ("metric", metric)):
            check_tensor(NAME, name, t)
        for name, option in (("size", size), ("source", source)):
            check_tensor(NAME, name, option, optional=True)
        check(x.dim() == 3, NAME, "x", "must have 3 dimensions [B, N, C]", x.dim())
        tokens = x.shape[:2]
        if metric.dim() not in (3, 4) or metric.shape[:2] != tokens:
            rule = f"must have shape [{tokens[0]}, {tokens[1]}, D] or [.., .., H, D]"
            fail(NAME, "metric", rule, metric.shape)
        if size is not None and size.shape != tokens:
            fail(NAME, "size", f"must have shape {list(tokens)}", size.shape)
        if source is not None and (source.dim() != 2 or source.shape[0] != tokens[0]):
            fail(NAME, "source", f"must have shape [{tokens[0]}, N0]", source.shape)
        if source is not None and source.dtype not in (torch.int32, torch.int64):
            fail(NAME, "source", "must be int32 or int64", source.dtype)
        check_dtype(NAME, "metric", metric, float64=True)
        for name, option in (("metric", metric), ("size", size), ("source", source)):
            if option is not None:
                check_device_of(NAME, name, option, "x", x)

    @staticmethod
    def attention_bias(size: Tensor) -> Tensor:
        """The bias ``[B, 1, 1, N]`` for :func:`tokenmill.attention`: log(size), -inf for size 0."""
        return size.log()[:, None, None]

    def unmerge(self, y: Tensor, source: Tensor) -> Tensor:
        """``[B, N0, C]``: a copy of its row for each original token."""
        return unmerge_tokens(y, source, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, class_token={self.class_token}, distill_token={self.distill_token}, "
            f"threshold={self.threshold}"
        )
