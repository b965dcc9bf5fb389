"""Sigmoid attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .._check import as_number, check, check_bool, check_float32, fail
from ..dense.sigmoid_attention import sigmoid_attention
from ..dense.terms import ScoreBias
from ..linear.lightning_slopes import lightning_slopes
from .rules import check_heads, check_input

NAME = "nn.SigmoidAttention"


class SigmoidAttention(nn.Module):
    r"""Attention with sigmoid weights, and the paper's options that keep its outputs small at
    initialisation:

    .. math::
       q, k, v = x W_{qkv}, \qquad
       y = \gamma \odot \operatorname{norm}\big(\sigma(n(q)\, n(k)^\top / \sqrt{d} + b)\, v\, W_o
           \big).

    A row of weights does not sum to 1: with b = 0 it would sum to half the number of keys. The
    paper's recipes:

    - vision: b = -log n, layer_scale=1e-4;
    - language models: causal, qk_norm, b = -log n, and at 7 billion parameters or 4096 tokens
      hybrid_norm, so that a block is x + norm(attention(norm(x))).

    Args:
        dim: channels C of the input.
        num_heads: number of heads, a divisor of the channels.
        causal: whether a token only sees itself and earlier tokens.
        qk_norm: whether queries and keys pass a layer norm over the channels of a head, n above.
        score_bias: b, "neg_log_n" (minus the logarithm of the number of keys) or a number.
        learn_bias: whether the bias is a learned parameter per head, initialised with score_bias.
        layer_scale: initial value of the per-channel parameter :math:`\gamma`. None: no layer
            scale.
        hybrid_norm: whether the result passes a layer norm, norm above.
        alibi: whether to subtract the distance of tokens times the ALiBi slopes from the logits.
        bias: whether the two projections have biases.
        backend: backend of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]``, or packed ``[T, C]`` with cu_seqlens int32 ``[B + 1]``, offsets of the
        sequences (n is then the length of each); to the same; float16, bfloat16, float32.
        :meth:`attend` takes queries, keys and values in one tensor, like the published code, and
        leaves both projections, norm and gamma to the caller.

    Weights: qkv ``[3 C, C]``, proj ``[C, C]``; q_norm, k_norm with qk_norm; norm with hybrid_norm;
    gamma ``[C]`` with layer_scale; score_bias ``[H]`` with learn_bias.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: 8 C^2 + 4 C N operations per token, half of 4 C N if causal. The backward needs no
    row statistics.

    Paper: Theory, Analysis, and Best Practices for Sigmoid Self-Attention (Ramapuram et al. 2024),
    sections 2 and 5. Its rotary embedding is not part of this layer. The published code uses -7.62,
    minus the logarithm of 2048, for models trained at that length.

    Example:
        >>> import torch, tokenmill as tm
        >>> layer = tm.nn.SigmoidAttention(64, num_heads=4, causal=True, hybrid_norm=True)
        >>> layer(torch.randn(2, 50, 64)).shape
        torch.Size([2, 50, 64])
        >>> ends = torch.tensor([0, 20, 50], dtype=torch.int32)
        >>> layer(torch.randn(50, 64), ends).shape
        torch.Size([50, 64])
        >>> layer.attend(torch.randn(2, 50, 3, 4, 16)).shape
        torch.Size([2, 50, 4, 16])
    """

    slopes: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        qk_norm: bool = True,
        score_bias: float | Literal["neg_log_n"] = "neg_log_n",
        learn_bias: bool = False,
        layer_scale: float | None = None,
        hybrid_norm: bool = False,
        alibi: bool = False,
        bias: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(NAME, dim, num_heads)
        for name, flag in (
            ("causal", causal),
            ("qk_norm", qk_norm),
            ("learn_bias", learn_bias),
            ("hybrid_norm", hybrid_norm),
            ("alibi", alibi),
            ("bias", bias),
        ):
            check_bool(NAME, name, flag)
        if not (isinstance(score_bias, str) and score_bias == "neg_log_n"):
            rule = "must be 'neg_log_n' or a number"
            score_bias = as_number(NAME, "score_bias", score_bias, rule)
        numeric = not learn_bias or isinstance(score_bias, float)
        check(numeric, NAME, "learn_bias", "requires a score_bias that is a number", learn_bias)
        self.num_heads, self.causal, self.backend = num_heads, causal, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.norm = nn.LayerNorm(dim) if hybrid_norm else nn.Identity()
        self.score_bias: ScoreBias = score_bias
        if learn_bias:
            start = float(score_bias)
            check_float32(NAME, "score_bias", start, " to be learned")
            self.score_bias = nn.Parameter(torch.full((num_heads,), start))
        self.gamma: nn.Parameter | None = None
        if layer_scale is not None:
            layer_scale = as_number(NAME, "layer_scale", layer_scale)
            check_float32(NAME, "layer_scale", layer_scale)
            self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        slopes = lightning_slopes(num_heads) if alibi else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        check_input(NAME, "x", x, self.qkv.weight)
        rank, channels = 3 if cu_seqlens is None else 2, self.proj.in_features
        shaped = x.dim() == rank and x.shape[-1] == channels
        layout = f"[B, N, {channels}]" if rank == 3 else f"[T, {channels}] with cu_seqlens"
        check(shaped, NAME, "x", f"must have shape {layout}", x.shape)
        out = self.attend(self.qkv(x), cu_seqlens, max_seqlen)
        y: Tensor = self.norm(self.proj(out.flatten(-2)))
        return y if self.gamma is None else y * self.gamma

    def attend(
        self, qkv: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Only the attention, over queries, keys and values that are views of one tensor:
        ``[B, N, 3, H, D]``, or the output ``[B, N, 3 C]`` of one projection, to ``[B, N, H, D]``;
        with cu_seqlens ``[T, 3, H, D]`` or ``[T, 3 C]`` to ``[T, H, D]``."""
        check_input(NAME, "qkv", qkv, self.proj.weight)
        lead = 2 if cu_seqlens is None else 1
        channels, heads = self.proj.in_features, self.num_heads
        split = [3, heads, channels // heads]
        if qkv.dim() == lead + 1 and qkv.shape[-1] == 3 * channels:
            qkv = qkv.unflatten(-1, split)
        if qkv.dim() != lead + 3 or list(qkv.shape[lead:]) != split:
            first, packed = ("B, N", "") if lead == 2 else ("T", " with cu_seqlens")
            end = f"[{first}, 3, {heads}, {split[2]}] or [{first}, {3 * channels}]{packed}"
            fail(NAME, "qkv", f"must have shape {end}", qkv.shape)
        q, k, v = qkv.unbind(-3)
        return sigmoid_attention(
            self.q_norm(q), self.k_norm(k), v, score_bias=self.score_bias,
            alibi_slopes=self.slopes, causal=self.causal, cu_seqlens_q=cu_seqlens,
            max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        bias = "learned" if isinstance(self.score_bias, Tensor) else repr(self.score_bias)
        return f"num_heads={self.num_heads}, causal={self.causal}, score_bias={bias}"
