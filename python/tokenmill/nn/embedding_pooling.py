"""Text embeddings from the hidden states of a language model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import MAX_HEAD_DIM, as_int, check, check_bool, check_device_of, check_tensor
from ..dense.attention import attention
from ..tokens.gather_tokens import gather_tokens
from ..tokens.segment_reduce import segment_reduce
from .rules import check_input, renamed

NAME = "nn.EmbeddingPooling"
PUBLISHED = {
    "cross_attend_blocks.0.norm.": "norm.",
    "cross_attend_blocks.0.norm_context.": "norm_context.",
    "cross_attend_blocks.0.fn.to_q.": "to_q.",
    "cross_attend_blocks.0.fn.to_kv.": "to_kv.",
    "cross_attend_blocks.0.fn.to_out.": "to_out.",
    "cross_attend_blocks.1.norm.": "ff_norm.",
    "cross_attend_blocks.1.fn.net.0.": "ff_in.",
    "cross_attend_blocks.1.fn.net.2.": "ff_out.",
}


class EmbeddingPooling(nn.Module):
    r"""Pools the hidden states of a text into its embedding.

    "last" takes the last token (EOS), "mean" the mean of the tokens; with "attention" r trained
    latents L attend to the tokens:

    .. math::
       z = \operatorname{softmax}\big(n'(L) W_q\, (n(x) W_k)^\top / \sqrt{d}\big)\, n(x) W_v\, W_o
           + L, \qquad
       y = \operatorname{mean}\big(z + \operatorname{GEGLU}(n''(z))\big).

    With layers, "last" or "mean" pools each layer of the model, and the latents attend to the
    pooled layers x, with an embedding of the layer number added. Embeddings have length 1.

    Args:
        dim: channels C.
        method: "last", "mean" or "attention".
        layers: number of layers that the latents attend to, with "last" and "mean". None: the
            method on the states of one layer.
        num_latents: r.
        num_heads, head_dim: H and d of the latents' attention, of any product.
        normalize: whether embeddings are divided by their length.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]`` and mask bool ``[B, N]``, True for valid tokens (None: all), or packed ``[T,
        C]`` with cu_seqlens int32 ``[B + 1]``; with layers one such tensor per layer, in a sequence
        or stacked in a leading dimension; to ``[B, C]``. A text without tokens is 0, or the
        latents' output for no input; float16, bfloat16, float32.

    Weights, unless the method is "last" or "mean" without layers: latents ``[r, C]``, to_q ``[H d,
    C]``, to_kv ``[2 H d, C]``, to_out ``[C, H d]``, ff_in ``[8 C, C]``, ff_out ``[C, 4 C]``, norm,
    norm_context and ff_norm (layer norms), with layers pos_emb ``[layers, C]``. State dicts of the
    published pooling layers load unchanged.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: "last" and "mean" read their rows once; the latents take 4 H d r operations per
    token or layer and 2 r (2 C H d + 12 C^2) per text. A head_dim above 256, as published, is
    computed by PyTorch, which holds [B, H, r, N] weights unless it has a kernel.

    Paper: Pooling And Attention (Tang and Yang 2024), section 3; 768 latents, 32 heads of 2048.
    The published layer for tokens attends to padding too.

    Example:
        >>> import torch, tokenmill as tm
        >>> states = [torch.randn(2, 9, 64) for _ in range(12)]
        >>> mask = torch.arange(9) < torch.tensor([[9], [4]])
        >>> tm.nn.EmbeddingPooling(64, "last")(states[-1], mask).shape
        torch.Size([2, 64])
        >>> pool = tm.nn.EmbeddingPooling(
        ...     64, "mean", layers=12, num_latents=16, num_heads=4, head_dim=16)
        >>> pool(states, mask).norm(dim=1)
        tensor([1., 1.], grad_fn=<LinalgVectorNormBackward0>)
    """

    def __init__(
        self,
        dim: int,
        method: Literal["last", "mean", "attention"] = "last",
        layers: int | None = None,
        *,
        num_latents: int = 768,
        num_heads: int = 32,
        head_dim: int = 2048,
        normalize: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim = as_int(NAME, "dim", dim, minimum=1, maximum=2**28 - 1)
        known = isinstance(method, str) and method in ("last", "mean", "attention")
        check(known, NAME, "method", "must be 'last', 'mean' or 'attention'", method)
        check_bool(NAME, "normalize", normalize)
        if layers is not None:
            layers = as_int(NAME, "layers", layers)
            fits = layers >= 1 and method != "attention"
            check(fits, NAME, "layers", "must be positive, and requires 'last' or 'mean'", layers)
        self.dim, self.method, self.layers = dim, method, layers
        self.normalize, self.backend = normalize, backend
        self.pos_emb: nn.Embedding | None = None
        if layers is None and method != "attention":
            return
        sizes = {"num_latents": num_latents, "num_heads": num_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            sizes[name] = as_int(NAME, name, size)
            check(1 <= sizes[name] < 2**20, NAME, name, "must be 1 to 2^20 - 1", size)
        self.num_heads = sizes["num_heads"]
        inner = sizes["num_heads"] * sizes["head_dim"]
        self.latents = nn.Parameter(torch.randn(sizes["num_latents"], dim))
        if layers is not None:
            self.pos_emb = nn.Embedding(layers, dim)
        self.norm, self.norm_context, self.ff_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.ff_in, self.ff_out = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)
        self.register_load_state_dict_pre_hook(functools.partial(renamed, PUBLISHED))

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        if self.layers is None:
            check_tensor(NAME, "x", x)
            assert isinstance(x, Tensor)
            states = [x]
        else:
            several = isinstance(x, Tensor | Sequence) and len(x) == self.layers
            check(several, NAME, "x", f"must be of {self.layers} layers", x)
            states = list(x)
        for each in states:
            self._check(each, mask, cu_seqlens)
        if self.method == "attention":
            y = self._attended(states[0], mask, cu_seqlens)
        else:
            pooled = [self._pooled(each, mask, cu_seqlens) for each in states]
            y = pooled[0]
            if self.pos_emb is not None:
                y = self._attended(torch.stack(pooled, 1) + self.pos_emb.weight)
        return F.normalize(y, dim=1) if self.normalize else y

    def _pooled(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """[B, C]"""
        if cu_seqlens is not None:
            y = segment_reduce(x, cu_seqlens, reduce=self.method, backend=self.backend)
        elif self.method == "last" and mask is not None:
            if mask.shape[1] == 0:
                return x.new_zeros((x.shape[0], self.dim))
            place = torch.arange(mask.shape[1], dtype=torch.int32, device=x.device)
            last = torch.where(mask, place, -1).amax(1, keepdim=True)
            y = gather_tokens(x, last, backend=self.backend)[:, 0]
        else:
            ends = torch.zeros((x.shape[0], 2), dtype=torch.int32, device=x.device)
            ends[:, 1] = x.shape[1]
            weight = None if mask is None else mask.to(torch.float32)
            y = segment_reduce(x, ends, weight=weight, reduce=self.method, backend=self.backend)
            assert isinstance(y, Tensor)
            y = y[:, 0]
        assert isinstance(y, Tensor)
        return y

    def _attended(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """[B, C]"""
        heads = (self.num_heads, -1)
        q = self.to_q(self.norm_context(self.latents)).unflatten(1, heads)
        k, v = (t.unflatten(-1, heads) for t in self.to_kv(self.norm(x)).chunk(2, -1))
        if cu_seqlens is None:
            out = self._cross(q.expand(x.shape[0], -1, -1, -1), k, v, mask)
        else:
            batch, latents = cu_seqlens.shape[0] - 1, q.shape[0]
            places = torch.arange(batch + 1, dtype=torch.int32, device=x.device)
            out = attention(
                q.repeat(batch, 1, 1), k, v, cu_seqlens_q=places * latents,
                cu_seqlens_k=cu_seqlens, max_seqlen_q=latents, backend=self.backend,
            ).unflatten(0, (batch, latents))  # fmt: skip
        z = self.to_out(out.flatten(2)) + self.latents
        value, gate = self.ff_in(self.ff_norm(z)).chunk(2, -1)
        return (z + self.ff_out(value * F.gelu(gate))).mean(1)

    def _cross(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, r, H, d]"""
        if q.shape[3] <= MAX_HEAD_DIM:
            seen = None if mask is None else mask[:, None, None].contiguous()
            return attention(q, k, v, bias=seen, backend=self.backend)
        if k.shape[1] == 0:
            return torch.zeros_like(q)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        some = mask.any(1, keepdim=True)
        seen = (mask | ~some)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        return torch.where(some[..., None, None], out, 0)

    def _check(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        check_tensor(NAME, "x", x)
        if self.layers is not None or self.method == "attention":
            check_input(NAME, "x", x, self.to_q.weight)
        check_tensor(NAME, "mask", mask, optional=True)
        check_tensor(NAME, "cu_seqlens", cu_seqlens, optional=True)
        packed = cu_seqlens is not None
        layout = f"[T, {self.dim}] with cu_seqlens" if packed else f"[B, N, {self.dim}]"
        shaped = x.dim() == (2 if packed else 3) and x.shape[-1] == self.dim
        check(shaped, NAME, "x", f"must have shape {layout}", x.shape)
        if cu_seqlens is not None:
            check_device_of(NAME, "cu_seqlens", cu_seqlens, "x", x)
            check(cu_seqlens.dtype == torch.int32, NAME, "cu_seqlens", "must be int32",
                  cu_seqlens.dtype)  # fmt: skip
            some = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1
            check(some, NAME, "cu_seqlens", "must have shape [B + 1]", cu_seqlens.shape)
            check(mask is None, NAME, "mask", "requires x [B, N, C]", mask)
            if self.method == "attention":
                width = self.to_q.out_features // self.num_heads
                rule = f"must be at most {MAX_HEAD_DIM} for packed texts"
                check(width <= MAX_HEAD_DIM, NAME, "head_dim", rule, width)
        if mask is not None:
            check_device_of(NAME, "mask", mask, "x", x)
            check(mask.dtype == torch.bool, NAME, "mask", "must be bool", mask.dtype)
            rule = f"must have shape {list(x.shape[:2])}"
            check(mask.shape == x.shape[:2], NAME, "mask", rule, mask.shape)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.method!r}, layers={self.layers}"
