"""The published PoolFormer models, from images to logits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._check import as_int, as_number, check, fail
from .pooling import PoolFormerMixing
from .rules import DropPath, begin, check_chance, check_input, check_mlp_ratio, drop_chances, four

NAME = "nn.PoolFormer"
NARROW, WIDE = (64, 128, 320, 512), (96, 192, 384, 768)


class PoolFormer(nn.Module):
    r"""A vision transformer whose token mixer is average pooling (:class:`PoolFormerMixing`). The
    published models are :func:`poolformer_s12`, :func:`poolformer_s24`, :func:`poolformer_s36`,
    :func:`poolformer_m36` and :func:`poolformer_m48`.

    A convolution quarters the sides of the image, others halve the sides of the map between the
    stages, which have blocks

    .. math::
       x \leftarrow x + \lambda_1 \odot \operatorname{mix}(\operatorname{GN}(x)), \quad
       x \leftarrow x + \lambda_2 \odot \operatorname{MLP}(\operatorname{GN}(x)),

    with group norms of one group (all channels and pixels of an image). After the stages come such
    a norm, the mean over the pixels and a linear layer.

    Args:
        depths: number of blocks of the four stages, 1 to 100 each.
        channels: channels of the four stages.
        mlp_ratio: hidden channels of an MLP divided by its input channels.
        pool_size: side of the window of the mixer, odd.
        layer_scale: initial value of lambda_1 and lambda_2, one number per channel. None: no layer
            scale.
        drop_path: probability of dropping a branch of the last block per image in training
            (stochastic depth); probabilities rise linearly from 0 at the first block.
        in_channels: channels of the images.
        num_classes: rows of the head; 0 omits it and returns the mean over the pixels.
        backend: backend of the operator (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, in_channels, Y, X]`` to ``[B, num_classes]``; float16, bfloat16, float32. Images
        have at least 3 pixels per side. :meth:`features` returns the maps of the stages ``[B,
        channels[i], Y', X']``, with Y' about Y / 4, Y / 8, Y / 16 and Y / 32, for dense prediction.

    Weights: patch_embed.proj, network.0, .2, .4 and .6 (the stages; blocks with norm1, norm2,
    mlp.fc1, mlp.fc2, layer_scale_1 and layer_scale_2), network.1, .3 and .5 (proj), norm and head,
    with the names of the published models: their checkpoints load strictly. Initialisation is as in
    these models: matrices have normal weights with standard deviation 0.02, and biases of 0.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: linear in the pixels; 1.8, 3.4, 5.0, 8.8 and 11.6 G multiplications for S12, S24,
    S36, M36 and M48 at 224 x 224.

    Paper: PoolFormer (Yu et al. 2022), section 3.2 and table 1. From the released code: layers,
    their order and names, depths, channels, mlp_ratio, layer_scale and initialisation.

    Example:
        >>> import torch, tokenmill as tm
        >>> model = tm.nn.PoolFormer((1, 1, 1, 1), (16, 24, 32, 32), num_classes=10).eval()
        >>> x = torch.randn(1, 3, 64, 96)
        >>> model(x).shape, model.features(x)[1].shape
        (torch.Size([1, 10]), torch.Size([1, 24, 8, 12]))
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        channels: Sequence[int] = NARROW,
        *,
        mlp_ratio: float = 4,
        pool_size: int = 3,
        layer_scale: float | None = 1e-5,
        drop_path: float = 0.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        depths = four(NAME, "depths", depths)
        depths = [as_int(NAME, "depths", n, minimum=1, maximum=100) for n in depths]
        channels = four(NAME, "channels", channels)
        channels = [as_int(NAME, "channels", n, minimum=1, maximum=2**24 - 1) for n in channels]
        mlp_ratio = check_mlp_ratio(NAME, mlp_ratio, *channels)
        if layer_scale is not None:
            layer_scale = as_number(NAME, "layer_scale", layer_scale)
        in_channels = as_int(NAME, "in_channels", in_channels, minimum=1, maximum=2**31 - 1)
        num_classes = as_int(NAME, "num_classes", num_classes, minimum=0, maximum=2**31 - 1)
        chances = iter(drop_chances(check_chance(NAME, "drop_path", drop_path), sum(depths)))
        self.in_channels = in_channels
        self.patch_embed = _convolution(in_channels, channels[0], 7, 4, 2)
        self.network = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, channels, strict=True)):
            if i > 0:
                self.network.append(_convolution(channels[i - 1], dim, 3, 2, 1))
            blocks = (
                _Block(dim, int(mlp_ratio * dim), layer_scale, next(chances),
                       PoolFormerMixing(pool_size, channels_first=True, backend=backend))
                for _ in range(depth)
            )  # fmt: skip
            self.network.append(nn.Sequential(*blocks))
        self.norm = nn.GroupNorm(1, channels[-1])
        self.head = nn.Linear(channels[-1], num_classes) if num_classes else nn.Identity()
        self.apply(begin)

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of the four stages, channels first, without the final norm."""
        check_input(NAME, "x", x, self.norm.weight)
        shaped = x.dim() == 4 and x.shape[1] == self.in_channels
        check(shaped, NAME, "x", f"must have shape [B, {self.in_channels}, Y, X]", x.shape)
        if min(x.shape[2:]) < 3:
            fail(NAME, "x", "must have at least 3 pixels a side", list(x.shape[2:]))
        # The mixer reads pixels channels-last, and convolutions keep this memory format.
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        maps = []
        for i, layer in enumerate(self.network):
            x = layer(x)
            if i % 2 == 0:
                maps.append(x)
        return tuple(maps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.features(x)[-1]).flatten(2).mean(2))
        return y


def poolformer_s12(**options: Any) -> PoolFormer:
    """PoolFormer-S12, 11.9 M parameters: depths 2, 2, 6, 2 and channels 64, 128, 320, 512.

    Args:
        options: other arguments of :class:`PoolFormer`, such as drop_path (0.1 in the paper).

    Example:
        >>> import torch, tokenmill as tm
        >>> tm.nn.poolformer_s12().eval()(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """
    return PoolFormer((2, 2, 6, 2), NARROW, **options)


def poolformer_s24(**options: Any) -> PoolFormer:
    """PoolFormer-S24, 21.4 M parameters: depths 4, 4, 12, 4 and the channels of S12.

    Args:
        options: other arguments of :class:`PoolFormer`, such as drop_path (0.1 in the paper).

    Example:
        >>> import torch, tokenmill as tm
        >>> with torch.device("meta"):
        ...     model = tm.nn.poolformer_s24()
        >>> sum(p.numel() for p in model.parameters())
        21388968
    """
    return PoolFormer((4, 4, 12, 4), NARROW, **options)


def poolformer_s36(**options: Any) -> PoolFormer:
    """PoolFormer-S36, 30.9 M parameters: depths 6, 6, 18, 6, the channels of S12 and a
    layer_scale of 1e-6.

    Args:
        options: other arguments of :class:`PoolFormer`, such as drop_path (0.2 in the paper).

    Example:
        >>> import torch, tokenmill as tm
        >>> with torch.device("meta"):
        ...     model = tm.nn.poolformer_s36()
        >>> sum(p.numel() for p in model.parameters())
        30862760
    """
    return PoolFormer((6, 6, 18, 6), NARROW, **{"layer_scale": 1e-6} | options)


def poolformer_m36(**options: Any) -> PoolFormer:
    """PoolFormer-M36, 56.2 M parameters: depths 6, 6, 18, 6, channels 96, 192, 384, 768 and a
    layer_scale of 1e-6.

    Args:
        options: other arguments of :class:`PoolFormer`, such as drop_path (0.3 in the paper).

    Example:
        >>> import torch, tokenmill as tm
        >>> with torch.device("meta"):
        ...     model = tm.nn.poolformer_m36()
        >>> sum(p.numel() for p in model.parameters())
        56172520
    """
    return PoolFormer((6, 6, 18, 6), WIDE, **{"layer_scale": 1e-6} | options)


def poolformer_m48(**options: Any) -> PoolFormer:
    """PoolFormer-M48, 73.5 M parameters: depths 8, 8, 24, 8, the channels of M36 and a
    layer_scale of 1e-6.

    Args:
        options: other arguments of :class:`PoolFormer`, such as drop_path (0.4 in the paper).

    Example:
        >>> import torch, tokenmill as tm
        >>> with torch.device("meta"):
        ...     model = tm.nn.poolformer_m48()
        >>> sum(p.numel() for p in model.parameters())
        73473448
    """
    return PoolFormer((8, 8, 24, 8), WIDE, **{"layer_scale": 1e-6} | options)


class _Block(nn.Module):
    def __init__(
        self, dim: int, hidden: int, layer_scale: float | None, chance: float, mixer: nn.Module
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.token_mixer = mixer
        fc1, fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        for conv in (fc1, fc2):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        self.mlp = nn.Sequential(OrderedDict({"fc1": fc1, "act": nn.GELU(), "fc2": fc2}))
        self.drop_path = DropPath(chance)
        self.layer_scale_1, self.layer_scale_2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.token_mixer(self.norm1(x))
        x = x + self.drop_path(_scaled(mixed, self.layer_scale_1))
        fed = self.mlp(self.norm2(x))
        return x + self.drop_path(_scaled(fed, self.layer_scale_2))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale[:, None, None]


def _convolution(before: int, dim: int, side: int, stride: int, padding: int) -> nn.Sequential:
    conv = nn.Conv2d(before, dim, side, stride=stride, padding=padding)
    return nn.Sequential(OrderedDict({"proj": conv}))
