"""The published BiFormer models, from images to logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from .._check import as_int, check, check_bool, fail
from .biformer import AttentionLePE, BiFormerAttention, Padding
from .rules import DropPath, begin, check_chance, check_input, check_mlp_ratio, drop_chances, four

NAME = "nn.BiFormer"
NARROW, WIDE = (64, 128, 256, 512), (96, 192, 384, 768)
Layout = Literal["biformer", "swin"]


class BiFormer(nn.Module):
    r"""A vision transformer whose early stages attend to routed regions, and whose last stage
    attends to all pixels. The published models are :func:`biformer_tiny`,
    :func:`biformer_small`, :func:`biformer_base` and :func:`biformer_stl`.

    A stage halves the sides of the map (the first stage quarters the sides of the image) and has
    blocks

    .. math::
       x \leftarrow x + \operatorname{DWConv}_3(x), \quad
       x \leftarrow x + \operatorname{attn}(\operatorname{LN}(x)), \quad
       x \leftarrow x + \operatorname{MLP}(\operatorname{LN}(x)).

    After the stages come a batch norm, the mean over the pixels and a linear layer.

    Args:
        depths: number of blocks of the four stages, 1 to 100 each.
        channels: channels of the four stages.
        mlp_ratio: hidden channels of an MLP divided by its input channels.
        topk: number of regions that a region attends to in each stage; None =
            :class:`AttentionLePE` with 8 heads instead of :class:`BiFormerAttention` (the release
            writes -2).
        regions: number of regions along each side of a map, 1 to 64.
        head_dim: channels of a head of :class:`BiFormerAttention`.
        side_dwconv: kernel size of the convolution in the attention layers; 0 omits it.
        drop_path: probability of dropping a branch of the last block per image in training
            (stochastic depth); probabilities rise linearly from 0 at the first block.
        in_channels: channels of the images.
        num_classes: rows of the head; 0 omits it and returns the mean over the pixels.
        layout: "biformer", as above, or "swin", the layout of the paper's ablation: non-overlapping
            patches, and no convolution before a block.
        channels_first: batch norms instead of layer norms, and the attention of the refactored
            release, whose local term in the last stage convolves the values.
        padding: padding of :class:`BiFormerAttention`, where regions do not divide a map. None = as
            in the release: "input", or "zeros" with channels_first. "mask" excludes the padding
            from the softmax, unlike the release. With "mask" or "zeros", a routed map must have at
            least ``regions`` pixels per side.
        backend: backend of the operators (see :func:`tokenmill.explain`).

    Shape:
        x ``[B, in_channels, Y, X]`` to ``[B, num_classes]``; float16, bfloat16, float32. Images
        have any size (at least 32 pixels per side with "swin"). :meth:`features` returns the maps
        of the stages ``[B, channels[i], Y', X']``, with Y' about Y / 4, Y / 8, Y / 16 and Y / 32,
        for dense prediction.

    Weights: checkpoints of the release (their entry "model") load strictly. Initialisation is as in
    the release: linear layers have normal weights with standard deviation 0.02, and biases of 0.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: O((Y X)^(4/3)) for the best number of regions; 2.2, 4.5 and 9.8 G multiplications
    for tiny, small and base at 224 x 224.

    Paper: BiFormer (Zhu et al. 2023). From the released code: layers, their order and names,
    depths, channels, mlp_ratio, topk, regions, head_dim, side_dwconv, scales, padding,
    initialisation, the default drop_path, and 0.15 in the command that trains small. Only from the
    text of the paper: 0.1 for tiny and 0.4 for base.

    Example:
        >>> import torch, tokenmill as tm
        >>> model = tm.nn.BiFormer((1, 1, 1, 1), (32, 64, 64, 64), num_classes=10).eval()
        >>> x = torch.randn(1, 3, 64, 96)
        >>> model(x).shape, model.features(x)[1].shape
        (torch.Size([1, 10]), torch.Size([1, 64, 8, 12]))
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        channels: Sequence[int] = NARROW,
        *,
        mlp_ratio: float = 3,
        topk: Sequence[int | None] = (1, 4, 16, None),
        regions: int = 7,
        head_dim: int = 32,
        side_dwconv: int = 5,
        drop_path: float = 0.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        layout: Layout = "biformer",
        channels_first: bool = False,
        padding: Padding | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        depths = four(NAME, "depths", depths)
        depths = [as_int(NAME, "depths", n, minimum=1, maximum=100) for n in depths]
        regions = as_int(NAME, "regions", regions)
        rule = "must be 1 to 64, whose fourth power is the number of products of regions"
        check(1 <= regions <= 64, NAME, "regions", rule, regions)
        head_dim = as_int(NAME, "head_dim", head_dim, minimum=1)
        channels = four(NAME, "channels", channels)
        channels = [as_int(NAME, "channels", n, minimum=1, maximum=2**24 - 1) for n in channels]
        if channels[0] < 2:
            fail(NAME, "channels", "must begin with 2 or more", channels)
        mlp_ratio = check_mlp_ratio(NAME, mlp_ratio, *channels)
        drop_path = check_chance(NAME, "drop_path", drop_path)
        in_channels = as_int(NAME, "in_channels", in_channels, minimum=1, maximum=2**31 - 1)
        num_classes = as_int(NAME, "num_classes", num_classes, minimum=0, maximum=2**31 - 1)
        known = isinstance(layout, str) and layout in ("biformer", "swin")
        check(known, NAME, "layout", "must be 'biformer' or 'swin'", layout)
        check_bool(NAME, "channels_first", channels_first)
        self.in_channels, self.minimum = in_channels, 32 if layout == "swin" else 1
        downsample = _patches if layout == "swin" else _convolutions
        pairs = zip((None, *channels[:-1]), channels, strict=True)
        self.downsample_layers = nn.ModuleList(downsample(in_channels, *pair) for pair in pairs)
        stage: type[nn.Module] = _Stage if layout == "swin" else nn.Sequential
        chances = iter(drop_chances(drop_path, sum(depths)))
        self.stages = nn.ModuleList()
        for depth, dim, k in zip(depths, channels, four(NAME, "topk", topk), strict=True):
            if k is not None and dim % head_dim:
                rule = f"must divide the channels of a routed stage, {dim}"
                fail(NAME, "head_dim", rule, head_dim)
            attention: dict[str, Any] = {"side_dwconv": side_dwconv, "backend": backend}
            if k is not None:
                usual: Padding = "zeros" if channels_first else "input"
                attention |= {"num_heads": dim // head_dim, "regions": regions, "topk": k}
                attention["padding"] = usual if padding is None else padding
            blocks = [
                _Block(dim, int(mlp_ratio * dim), attention, chance=next(chances),
                       swin=layout == "swin", channels_first=channels_first)
                for _ in range(depth)
            ]  # fmt: skip
            self.stages.append(stage(*blocks))
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes) if num_classes else nn.Identity()
        self.apply(begin)

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of the four stages, channels first, without the final norm."""
        weight = self.norm.weight
        check_input(NAME, "x", x, weight)
        shaped = x.dim() == 4 and x.shape[1] == self.in_channels
        check(shaped, NAME, "x", f"must have shape [B, {self.in_channels}, Y, X]", x.shape)
        if min(x.shape[2:]) < self.minimum:
            rule = f"must have at least {self.minimum} pixels a side"
            fail(NAME, "x", rule, list(x.shape[2:]))
        if self.training and x.shape[0] == 1 and max(x.shape[2:]) <= 32:
            rule = "must be more than one image of up to 32 x 32 pixels in training, for its norms"
            fail(NAME, "x", rule, x.shape)
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return tuple(maps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.features(x)[-1]).flatten(2).mean(2))
        return y


def biformer_tiny(**options: Any) -> BiFormer:
    """BiFormer-T, 13.1 M parameters: depths 2, 2, 8, 2 and channels 64, 128, 256, 512.

    Args:
        options: other arguments of :class:`BiFormer`, such as drop_path (0.1 in the paper).

    Example:
        >>> import torch, tokenmill as tm
        >>> model = tm.nn.biformer_tiny().eval()
        >>> round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
        13.1
        >>> model(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """
    return BiFormer(**{"depths": (2, 2, 8, 2), "channels": NARROW, **options})


def biformer_small(**options: Any) -> BiFormer:
    """BiFormer-S, 25.5 M parameters: depths 4, 4, 18, 4 and channels 64, 128, 256, 512. Takes the
    options of :class:`BiFormer`; drop_path is 0.15 in the paper and in its training command.
    """
    return BiFormer(**{"depths": (4, 4, 18, 4), "channels": NARROW, **options})


def biformer_base(**options: Any) -> BiFormer:
    """BiFormer-B, 56.8 M parameters: depths 4, 4, 18, 4 and channels 96, 192, 384, 768. Takes the
    options of :class:`BiFormer`; drop_path is 0.4 in the paper.
    """
    return BiFormer(**{"depths": (4, 4, 18, 4), "channels": WIDE, **options})


def biformer_stl(**options: Any) -> BiFormer:
    """BiFormer-STL, 28.4 M parameters, in the layout of Swin-T: depths 2, 2, 6, 2, channels 96,
    192, 384, 768 and mlp_ratio 4. Takes the options of :class:`BiFormer`; channels_first=True is
    the refactored model of the release.
    """
    given = {"depths": (2, 2, 6, 2), "channels": WIDE, "mlp_ratio": 4, "layout": "swin"}
    return BiFormer(**{**given, **options})


class _Block(nn.Module):
    """[B, C, Y, X] to the same; attention: the arguments of its attention layer."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        attention: dict[str, Any],
        *,
        chance: float,
        swin: bool,
        channels_first: bool,
    ) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.pos_embed = None if swin else nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = (
            nn.BatchNorm2d(dim) if channels_first else nn.LayerNorm(dim, eps=1e-6) for _ in range(2)
        )
        self.attn: nn.Module = (
            BiFormerAttention(dim, **attention)
            if "topk" in attention
            else AttentionLePE(dim, local="values" if channels_first else "input", **attention)
        )
        linear = functools.partial(nn.Conv2d, kernel_size=1) if channels_first else nn.Linear
        between = [] if swin else [nn.Identity()]  # it has a number in the published names
        self.mlp = nn.Sequential(linear(dim, hidden), *between, nn.GELU(), linear(hidden, dim))
        self.drop_path = DropPath(chance)

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        if self.channels_first:
            attended = self.attn(self.norm1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = x + self.drop_path(attended)
            return x + self.drop_path(self.mlp(self.norm2(x)))
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return (x + self.drop_path(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)


class _Stage(nn.Module):
    """Blocks, under their name in the Swin layout."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


def _convolutions(pixels: int, before: int | None, dim: int) -> nn.Sequential:
    """Halves the sides of a map, or quarters the sides of the image."""
    half = functools.partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
    if before is not None:
        return nn.Sequential(half(before, dim), nn.BatchNorm2d(dim))
    first = (half(pixels, dim // 2), nn.BatchNorm2d(dim // 2), nn.GELU())
    return nn.Sequential(*first, half(dim // 2, dim), nn.BatchNorm2d(dim))


def _patches(pixels: int, before: int | None, dim: int) -> nn.Sequential:
    if before is None:
        return nn.Sequential(nn.Conv2d(pixels, dim, 4, 4), nn.BatchNorm2d(dim))
    return nn.Sequential(nn.BatchNorm2d(before), nn.Conv2d(before, dim, 2, 2))
