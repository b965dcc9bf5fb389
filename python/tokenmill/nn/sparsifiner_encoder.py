"""Vision transformer blocks with Sparsifiner attention, some of which drop tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import as_int, as_number, check
from ..tokens.gather_tokens import gather_tokens
from ..tokens.topk_partition import topk_partition
from .rules import (
    VisionBlock,
    begin,
    check_chance,
    check_heads,
    check_input,
    check_layers,
    check_mlp_ratio,
    drop_chances,
)
from .sparsifiner import SparsifinerAttention

NAME = "nn.SparsifinerEncoder"


class SparsifinerEncoder(nn.Module):
    r"""The blocks of a plain vision transformer with sparse connectivity (each token attends to a
    fraction of the others, :class:`SparsifinerAttention`) and token sparsity (some blocks drop
    tokens):

    .. math::
       x \leftarrow x + \operatorname{attn}(\operatorname{LN}(x)), \quad
       x \leftarrow \operatorname{top}(x), \quad
       x \leftarrow x + \operatorname{MLP}(\operatorname{LN}(x)).

    After the attention of the i-th of ``layers`` (from 0), the ceil(r^(i + 1) (N - 1)) patches to
    which the class token attends most are kept in order, ties to the first, where r is
    token_keep_rate. Embeddings, the final norm and the head are left to the caller.

    Args:
        dim: channels C.
        num_heads: number of heads, a divisor of the channels.
        depth: number of blocks, 1 to 1000.
        num_tokens: number of tokens N, the class token first: patterns belong to positions.
        layers: indices (from 0) of the blocks that drop tokens, ascending.
        token_keep_rate: r, above 0 and at most 1; 1: all are kept.
        keep_rate: fraction of the N tokens that each token attends to; one for all, or one for each
            block.
        reduce_tokens, reduce_channels, coefficients, basis_threshold: as in
            :class:`SparsifinerAttention`.
        mlp_ratio: hidden channels of an MLP divided by its input channels.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path: probability of dropping a branch of the last block per image in training
            (stochastic depth); probabilities rise linearly from 0 at the first block.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, N, C]`` to (y ``[B, 1 + M, C]``, source int32 ``[B, M]``): the class token and the
        remaining patches, and the patch, from 0, of each row after the class token, in ascending
        order. float16, bfloat16, float32.

    Weights: blocks.i.norm1, blocks.i.attn (:class:`SparsifinerAttention`), blocks.i.norm2,
    blocks.i.mlp.fc1 and blocks.i.mlp.fc2, with the names of the published models: the entries
    "blocks." of their checkpoints load strictly; DeiT has all but mask_predictor. Initialisation is
    as in these models: linear layers have normal weights with standard deviation 0.02, and biases
    of 0.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: each block costs as much as its remaining tokens.

    Paper: Sparsifiner (Wei et al. 2023), section 4, sparse attention and token sparsity combined.
    layers and token_keep_rate are the defaults of the released code, whose rate of 1 removes no
    token; its blocks remove a token by setting it to 0, which gives the same rows.

    Example:
        >>> import torch, tokenmill as tm
        >>> encoder = tm.nn.SparsifinerEncoder(64, 2, 12, token_keep_rate=0.7).eval()
        >>> y, source = encoder(torch.randn(1, 197, 64))
        >>> y.shape, source.shape
        (torch.Size([1, 69, 64]), torch.Size([1, 68]))
    """

    def __init__(
        self,
        dim: int = 384,
        num_heads: int = 6,
        depth: int = 12,
        *,
        num_tokens: int = 197,
        layers: Sequence[int] = (3, 6, 9),
        token_keep_rate: float = 1.0,
        keep_rate: float | Sequence[float] = 0.25,
        reduce_tokens: int = 6,
        reduce_channels: int = 2,
        coefficients: int | None = 8,
        basis_threshold: float = 0.02,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(NAME, dim, num_heads)
        depth = as_int(NAME, "depth", depth, minimum=1, maximum=1000)
        layers = check_layers(NAME, layers, depth)
        rate = as_number(NAME, "token_keep_rate", token_keep_rate)
        check(0 < rate <= 1, NAME, "token_keep_rate", "must be above 0 and at most 1", rate)
        rates: list[Any] = [keep_rate] * depth
        if isinstance(keep_rate, tuple | list):
            rates = list(keep_rate)
        rule = f"must be one, or one for each of {depth} blocks"
        check(len(rates) == depth, NAME, "keep_rate", rule, keep_rate)
        chances = drop_chances(check_chance(NAME, "drop_path", drop_path), depth)
        attentions = [
            SparsifinerAttention(
                dim, num_tokens, num_heads, keep_rate=share, reduce_tokens=reduce_tokens,
                reduce_channels=reduce_channels, coefficients=coefficients,
                basis_threshold=basis_threshold, qkv_bias=qkv_bias, backend=backend,
            )
            for share in rates
        ]  # fmt: skip
        hidden = int(check_mlp_ratio(NAME, mlp_ratio, dim) * dim)
        self.dim, self.num_tokens, self.backend = dim, attentions[0].num_tokens, backend
        self.budgets = {
            layer: math.ceil(rate ** (i + 1) * (self.num_tokens - 1))
            for i, layer in enumerate(layers)
        }
        self.blocks = nn.ModuleList(
            VisionBlock(dim, hidden, attention, chance)
            for attention, chance in zip(attentions, chances, strict=True)
        )
        self.apply(begin)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [self.num_tokens, self.dim]
        check_input(NAME, "x", x, self.get_parameter("blocks.0.norm1.weight"))
        shaped = x.dim() == 3 and list(x.shape[1:]) == wanted
        check(shaped, NAME, "x", f"must have shape [B, {wanted[0]}, {wanted[1]}]", x.shape)
        source = torch.arange(self.num_tokens - 1, dtype=torch.int32, device=x.device)
        source = source.expand(x.shape[0], -1)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, VisionBlock)
            places = source if source.shape[1] < self.num_tokens - 1 else None
            budget = self.budgets.get(i, source.shape[1])
            out, scores = block.attn.attend(block.norm1(x), places, budget < source.shape[1])
            x = x + block.drop_path(out)
            if scores is not None:
                keep, _ = topk_partition(scores, budget, order="index", backend=self.backend)
                source = source.gather(1, keep.long())
                rows = F.pad(keep + 1, (1, 0))  # the class token first
                x = gather_tokens(x, rows, backend=self.backend)
            x = block.fed(x)
        return x, source

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, budgets={self.budgets}"
