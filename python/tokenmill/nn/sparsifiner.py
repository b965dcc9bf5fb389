"""Sparsifiner attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_bool, check_device_of, check_tensor
from ..dense.attention import attention
from ..select.topk_select import topk_select
from ..sparse.block_sparse_attention import block_sparse_attention
from ..tokens.gather_tokens import gather_tokens
from .class_token import class_scores
from .rules import check_input

NAME = "nn.SparsifinerAttention"


class SparsifinerAttention(nn.Module):
    r"""Attention of each token to the tokens with the largest low-rank estimate of attention.

    The estimate is a mixture of n' learned patterns over the tokens, shared by all inputs. With
    queries and keys of c = D / 2 dimensions and the tokens reduced to n' = N / 6,

    .. math::
       C = \operatorname{softmax}\!\big((q W_q + b_q)\,((k W_k + b_k)^\top W_n)\, H^{-1/2}\big),
       \qquad \tilde A = \operatorname{top}_8(C)\, |W_{back}|^\top,

    where weights up to 0.02 and coefficients outside the 8 largest count as 0. A token attends, in
    each head, to the ceil(0.25 N) tokens with the largest :math:`\tilde A`, ties to the first. The
    class token attends to all. The choice has no gradient: the estimate is trained separately, by
    :meth:`approximate`.

    If tokens have been dropped (:class:`SparsifinerEncoder`), the remaining tokens only attend to
    each other, and the budget is clamped to the number of patches. For the class token each dropped
    token still counts with logit 0 and value 0, as in the published code, which sets their keys and
    values to 0.

    Args:
        dim: channels C of the input.
        num_tokens: number of tokens N, the class token first: patterns belong to positions.
        num_heads: heads H, which divide the channels.
        keep_rate: fraction of the tokens that each token attends to.
        reduce_tokens, reduce_channels: N / n' and D / c, rounded down: 32 patterns of 197 tokens.
        coefficients: maximum number of patterns in an estimate. None: all.
        basis_threshold: threshold that a pattern's weights must exceed.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]`` to ``[B, N, C]``; float16, bfloat16, float32. With places, an int32 or int64
        ``[B, M]`` of patches from 0 to N - 2 in ascending order, x is ``[B, 1 + M, C]``: the class
        token and these patches. :meth:`attend` also returns the attention of the class token.

    Weights: qkv, proj, and mask_predictor with proj_c_q, proj_c_k (linear), proj_n and proj_back_n
    ``[N, n']``, with the names of the published models.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: per head 4 N D c + 4 N c n' + 2 N^2 n' operations for the estimate (2 N^2 8 if only
    products of nonzero coefficients and patterns are counted) and 4 N K D for the attention to K
    tokens. The estimate is in memory, [B, H, N, N]; on a CPU dense attention is faster unless
    tokens keep less than about a sixteenth of the others (docs/sparse.md).

    Paper: Sparsifiner (Wei et al. 2023), sections 3.2 and 3.3. The defaults of reduce_tokens,
    coefficients, keep_rate and basis_threshold are from the published experiment; its functions
    default to reduce_tokens 8. The factor of the estimate is 1 / sqrt(H), not 1 / sqrt(c), as in
    the published code.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.SparsifinerAttention(64, num_tokens=197, num_heads=2)
        >>> layer(torch.randn(1, 197, 64)).shape
        torch.Size([1, 197, 64])
        >>> left = torch.arange(0, 196, 2)[None]
        >>> layer(torch.randn(1, 99, 64), left).shape
        torch.Size([1, 99, 64])
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int = 197,
        num_heads: int = 8,
        *,
        keep_rate: float = 0.25,
        reduce_tokens: int = 6,
        reduce_channels: int = 2,
        coefficients: int | None = 8,
        basis_threshold: float = 0.02,
        qkv_bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_tokens = as_int(NAME, "dim", dim), as_int(NAME, "num_tokens", num_tokens)
        num_heads = as_int(NAME, "num_heads", num_heads)
        reduce_tokens = as_int(NAME, "reduce_tokens", reduce_tokens)
        reduce_channels = as_int(NAME, "reduce_channels", reduce_channels)
        keep_rate = as_number(NAME, "keep_rate", keep_rate)
        basis_threshold = as_number(NAME, "basis_threshold", basis_threshold)
        check_bool(NAME, "qkv_bias", qkv_bias)
        if coefficients is not None:
            coefficients = as_int(NAME, "coefficients", coefficients)
        check(1 <= dim < 2**31, NAME, "dim", "must be 1 to 2^31 - 1", dim)
        divides = num_heads > 0 and dim % num_heads == 0
        check(divides, NAME, "num_heads", f"must divide dim, {dim}", num_heads)
        check(0 < keep_rate <= 1, NAME, "keep_rate", "must be above 0 and at most 1", keep_rate)
        patterns = num_tokens // reduce_tokens if reduce_tokens > 0 else 0
        rule = f"must be 1 to num_tokens, {num_tokens}"
        check(patterns >= 1, NAME, "reduce_tokens", rule, reduce_tokens)
        reduced = dim // num_heads // reduce_channels if reduce_channels > 0 else 0
        rule = f"must be 1 to the dimension of a head, {dim // num_heads}"
        check(reduced >= 1, NAME, "reduce_channels", rule, reduce_channels)
        fits = coefficients is None or coefficients >= 1
        check(fits, NAME, "coefficients", "must be at least 1, or None", coefficients)
        self.num_tokens, self.num_heads, self.backend = num_tokens, num_heads, backend
        self.budget = math.ceil(keep_rate * num_tokens)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.mask_predictor = LowRankAttention(
            dim // num_heads, reduced, num_tokens, patterns, num_heads, coefficients,
            basis_threshold, backend,
        )  # fmt: skip

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        return self.attend(x, places, scored=False)[0]

    def attend(
        self, x: Tensor, places: Tensor | None = None, scored: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The result of forward, and the attention of the class token to each other token, float32
        ``[B, N - 1]`` (``[B, M]`` with places): the mean over heads, without a gradient. It decides
        which tokens are kept. Without scored it is None.
        """
        check_bool(NAME, "scored", scored)
        q, k, v = self._qkv(x, places)
        scores = None
        if scored:
            # A dropped token has logit 0, as if its key were zeros.
            keys = F.pad(k, (0, 0, 0, 0, 0, self.num_tokens - k.shape[1]))
            with torch.no_grad():
                scores = class_scores(q, keys, backend=self.backend)[:, : k.shape[1] - 1]
        return self.proj(self._mixed(q, k, v, places).flatten(2)), scores

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None) -> Tensor:
        """[B, M, H, D]"""
        absent = self.num_tokens - k.shape[1]
        budget, rows, sink = self.budget, None, None
        if places is not None:
            budget = min(budget, k.shape[1] - 1)
            rows = F.pad(places.int() + 1, (1, 0))
            if absent > 0:
                sink = torch.full((self.num_heads,), math.log(absent), device=q.device)
        first = attention(q[:, :1], k, v, sink=sink, backend=self.backend)
        assert isinstance(first, Tensor)
        if k.shape[1] == 1:
            return first
        with torch.no_grad():
            scores = self.mask_predictor(q[:, 1:], k, sparse=True, rows=rows)
        lists = topk_select(scores.flatten(0, 2), budget, backend=self.backend)[:2]
        indices, counts = (t.unflatten(0, scores.shape[:3]) for t in lists)
        others = block_sparse_attention(
            q[:, 1:], k, v, indices, counts,
            block_q=1, block_k=1, backend=self.backend,
        )  # fmt: skip
        return torch.cat([first, others], 1)

    def approximate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate ``[B, H, N - 1, N]``, of all patterns and with its gradient, and the
        attention that it should match, for every token but the first: the inputs of the training
        loss (materialised: for training at the papers' lengths).
        """
        q, k, _ = self._qkv(x)
        z = torch.einsum("bihd,bjhd->bhij", q[:, 1:], k) * q.shape[-1] ** -0.5
        return self.mask_predictor(q[:, 1:], k, sparse=False), torch.softmax(z, -1)

    def _qkv(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, ...]:
        check_input(NAME, "x", x, self.qkv.weight)
        check_tensor(NAME, "places", places, optional=True)
        wanted = [self.num_tokens, self.proj.in_features]
        if places is not None:
            rule = f"must have shape [B, M] with M at most {self.num_tokens - 1}"
            fits = places.dim() == 2 and places.shape[1] < self.num_tokens
            check(fits, NAME, "places", rule, places.shape)
            whole = places.dtype in (torch.int32, torch.int64)
            check(whole, NAME, "places", "must be int32 or int64", places.dtype)
            check_device_of(NAME, "places", places, "x", x)
            fits = x.dim() == 3 and x.shape[0] == places.shape[0]
            check(fits, NAME, "places", "must have a row for each of x", places.shape)
            wanted[0] = 1 + places.shape[1]
        shaped = x.dim() == 3 and list(x.shape[1:]) == wanted
        check(shaped, NAME, "x", f"must have shape [B, {wanted[0]}, {wanted[1]}]", x.shape)
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, num_heads={self.num_heads}, budget={self.budget}"


class LowRankAttention(nn.Module):
    """Low-rank estimate: q ``[B, M, H, D]`` and k ``[B, N, H, D]`` to ``[B, H, M, N]``."""

    def __init__(
        self,
        dim: int,
        reduced: int,
        num_tokens: int,
        patterns: int,
        num_heads: int,
        coefficients: int | None,
        basis_threshold: float,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.proj_c_q = nn.Linear(dim, reduced)
        self.proj_c_k = nn.Linear(dim, reduced)
        self.proj_n = nn.Parameter(torch.empty(num_tokens, patterns))
        self.proj_back_n = nn.Parameter(torch.empty(num_tokens, patterns))
        for weight in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(weight, std=0.02)
        self.scale = num_heads**-0.5
        self.coefficients = coefficients
        self.basis_threshold = basis_threshold

    def forward(self, q: Tensor, k: Tensor, sparse: bool, rows: Tensor | None = None) -> Tensor:
        """sparse: use only pattern weights above the threshold, and the largest coefficients. rows
        int32 [B, N]: positions of the keys, which may be fewer than the positions of the patterns.
        """
        if rows is None:
            keys = torch.einsum("bjhc,jn->bhcn", self.proj_c_k(k), self.proj_n)
            basis = self.proj_back_n.T  # [n', N]
        else:
            down, back = (
                gather_tokens(weight.expand(len(rows), -1, -1), rows, backend=self.backend)
                for weight in (self.proj_n, self.proj_back_n)
            )
            keys = torch.einsum("bjhc,bjn->bhcn", self.proj_c_k(k), down)
            basis = back.mT[:, None]  # [B, 1, n', N]
        weights = self.proj_c_q(q).transpose(1, 2) @ keys * self.scale
        weights = torch.softmax(weights, -1)
        if sparse:
            basis = basis.abs()
            basis = torch.where(basis > self.basis_threshold, basis, 0)
            if self.coefficients is not None and self.coefficients < weights.shape[-1]:
                best = weights.topk(self.coefficients, -1)
                weights = torch.zeros_like(weights).scatter(-1, best.indices, best.values)
        return weights @ basis
