"""Vision transformer blocks with EViT token reorganisation, and its keep-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._check import as_int, as_number, check, check_bool, fail
from ..dense.attention import attention
from .class_token import EViTReorganize
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

NAME, SCHEDULE = "nn.EViTEncoder", "nn.keep_rate_schedule"


class EViTEncoder(nn.Module):
    r"""The blocks of a plain vision transformer; some drop patches between their attention and
    their MLP:

    .. math::
       x \leftarrow x + \operatorname{MHSA}(\operatorname{LN}(x)), \quad
       x \leftarrow \operatorname{reorganize}(x, a), \quad
       x \leftarrow x + \operatorname{MLP}(\operatorname{LN}(x)),

    where a are the :func:`class_scores` of the block's queries and keys, and reorganize is
    :class:`EViTReorganize`. Embeddings, the final norm and the head are left to the caller.

    Args:
        dim: channels C.
        num_heads: number of heads, a divisor of the channels.
        depth: number of blocks, 1 to 1000.
        layers: indices (from 0) of the blocks that drop patches, ascending.
        keep_rate: fraction of its patches that such a block keeps; one for all, or one for each.
        fuse: whether the others become one token, an ordinary patch in later blocks.
        mlp_ratio: hidden channels of an MLP divided by its input channels.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path: probability of dropping a branch of the last block per image in training
            (stochastic depth); probabilities rise linearly from 0 at the first block.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, 1 + N, C]``, the class token first, to (y ``[B, 1 + M, C]``, source int32
        ``[B, M]``): for each row of y after the class token its original patch, from 0, and -1 for
        a fused token. float16, bfloat16, float32. keep_rate and tokens of a call, one for all of
        ``layers`` or one for each, override the rates: the rate of a :func:`keep_rate_schedule` in
        training, or a number of patches to keep.

    Weights: blocks.i.norm1, blocks.i.attn.qkv, blocks.i.attn.proj, blocks.i.norm2, blocks.i.mlp.fc1
    and blocks.i.mlp.fc2, with the names of the published models and of DeiT: the entries "blocks."
    of their checkpoints load strictly. Initialisation is as in these models: linear layers have
    normal weights with standard deviation 0.02, and biases of 0.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: the blocks on the remaining tokens: 196 patches become 139, 99 and 71 at a rate of
    0.7, a third fewer operations (3.0 instead of 4.6 G multiplications for DeiT-S).

    Paper: EViT (Liang et al. 2022), section 3; the defaults are the released DeiT-S, at a keep_rate
    of 0.7, drop locations 3, 6 and 9, with fuse_token. Their epsilon of layer norms is 1e-6.

    Example:
        >>> import torch, tokenmill as tm
        >>> encoder = tm.nn.EViTEncoder().eval()
        >>> y, source = encoder(torch.randn(1, 197, 384))
        >>> y.shape, source.shape
        (torch.Size([1, 72, 384]), torch.Size([1, 71]))
        >>> encoder(torch.randn(1, 197, 384), tokens=(100, 50, 20))[0].shape
        torch.Size([1, 22, 384])
    """

    def __init__(
        self,
        dim: int = 384,
        num_heads: int = 6,
        depth: int = 12,
        *,
        layers: Sequence[int] = (3, 6, 9),
        keep_rate: float | Sequence[float] = 0.7,
        fuse: bool = True,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = check_heads(NAME, dim, num_heads)
        depth = as_int(NAME, "depth", depth, minimum=1, maximum=1000)
        layers = check_layers(NAME, layers, depth)
        check_bool(NAME, "qkv_bias", qkv_bias)
        mlp_ratio = check_mlp_ratio(NAME, mlp_ratio, dim)
        chances = drop_chances(check_chance(NAME, "drop_path", drop_path), depth)
        self.num_heads, self.layers, self.backend = num_heads, layers, backend
        self.blocks = nn.ModuleList(
            _Block(dim, int(mlp_ratio * dim), qkv_bias, chance) for chance in chances
        )
        self.reorganize = nn.ModuleList(
            EViTReorganize(rate, fuse=fuse, backend=backend)
            for rate in self._each("keep_rate", keep_rate)
        )
        self.apply(begin)

    def forward(
        self,
        x: Tensor,
        keep_rate: float | Sequence[float] | None = None,
        tokens: int | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        weight: Tensor = self.blocks[0].norm1.weight  # type: ignore[union-attr, assignment]
        check_input(NAME, "x", x, weight)
        shaped = x.dim() == 3 and x.shape[1] >= 1 and x.shape[2] == len(weight)
        check(shaped, NAME, "x", f"must have shape [B, 1 + N, {len(weight)}]", x.shape)
        source = torch.arange(x.shape[1] - 1, dtype=torch.int32, device=x.device)
        source = source.expand(x.shape[0], -1)
        rates, counts = self._each("keep_rate", keep_rate), self._each("tokens", tokens)
        for i, block in enumerate(self.blocks):
            q, k, v = block.qkv(x, self.num_heads)  # type: ignore[operator]
            x = block.attended(x, attention(q, k, v, backend=self.backend))  # type: ignore[operator]
            if i in self.layers:
                at = self.layers.index(i)
                layer: EViTReorganize = self.reorganize[at]  # type: ignore[assignment]
                x, keep = layer(x, layer.scores(q, k), rates[at], counts[at])
                source = source.gather(1, keep.long())
                if source.shape[1] < x.shape[1] - 1:
                    source = torch.cat([source, source.new_full((len(source), 1), -1)], 1)
            x = block.fed(x)  # type: ignore[operator]
        return x, source

    def _each(self, argument: str, given: Any) -> list[Any]:
        """One value for each of the layers."""
        if not isinstance(given, tuple | list):
            return [given] * len(self.layers)
        if len(given) != len(self.layers):
            rule = f"must be one, or one for each of {len(self.layers)} layers"
            fail(NAME, argument, rule, given)
        return list(given)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, layers={self.layers}"


class _Block(VisionBlock):
    """A vision transformer block, split into its two halves."""

    def __init__(self, dim: int, hidden: int, qkv_bias: bool, chance: float) -> None:
        attention = {"qkv": nn.Linear(dim, 3 * dim, bias=qkv_bias), "proj": nn.Linear(dim, dim)}
        super().__init__(dim, hidden, nn.ModuleDict(attention), chance)

    def qkv(self, x: Tensor, heads: int) -> tuple[Tensor, ...]:
        """[B, N, heads, D] each"""
        return self.attn["qkv"](self.norm1(x)).unflatten(2, (3, heads, -1)).unbind(2)

    def attended(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path(self.attn["proj"](out.flatten(2)))


def keep_rate_schedule(
    step: int, steps_per_epoch: int, base_rate: float = 0.7, *, start: int = 10, epochs: int = 100
) -> float:
    r"""The keep rate of a training step: 1 in the first epochs, then a cosine decay,

    .. math::
       r = r_0 + (1 - r_0) \frac{1 + \cos(\pi t)}{2}, \qquad
       t = \frac{step - start \cdot steps\_per\_epoch}{epochs \cdot steps\_per\_epoch},

    and the base rate r_0 afterwards.

    Args:
        step: training step, from 0.
        steps_per_epoch: number of steps per epoch.
        base_rate: final rate, above 0 and at most 1.
        start: number of epochs at a rate of 1.
        epochs: number of epochs of the decay; 0: immediate.

    Returns:
        The rate, for keep_rate of :class:`EViTReorganize` and :class:`EViTEncoder`.

    Raises:
        RuntimeError: naming argument, rule and value.

    Paper: EViT (Liang et al. 2022), training. The released command for training from scratch has
    start=10 and epochs=100 of 300 (its arguments default to 10 and 0); fine-tuning has 0 and 0.

    Example:
        >>> from tokenmill import nn
        >>> [round(nn.keep_rate_schedule(50 * epoch, 50), 3) for epoch in (0, 10, 35, 60, 110, 299)]
        [1.0, 1.0, 0.956, 0.85, 0.7, 0.7]
    """
    step = as_int(SCHEDULE, "step", step, minimum=0)
    steps_per_epoch = as_int(SCHEDULE, "steps_per_epoch", steps_per_epoch, minimum=1)
    base_rate = as_number(SCHEDULE, "base_rate", base_rate)
    rule = "must be above 0 and at most 1"
    check(0 < base_rate <= 1, SCHEDULE, "base_rate", rule, base_rate)
    start, epochs = as_int(SCHEDULE, "start", start), as_int(SCHEDULE, "epochs", epochs)
    for name, value in (("start", start), ("epochs", epochs)):
        check(value >= 0, SCHEDULE, name, "must not be negative", value)
    done, falling = step - start * steps_per_epoch, epochs * steps_per_epoch
    if done < 0:
        return 1.0
    if done >= falling:
        return base_rate
    return base_rate + (1 - base_rate) * (math.cos(done / falling * math.pi) + 1) / 2
