"""The published BiFormer models, whole, out of tokenmill's layers.

Parameters have the published names and shapes, so that a published checkpoint loads strictly. Of
the five models, three are those of the paper (tiny, small, base) and two have the layout of Swin-T:
"stl", and "stl-channels-first", whose blocks see maps [B, C, Y, X]. There is no stochastic depth.
Without weights they are random, and only the time of an image means something.

    python examples/biformer_model.py --model small
    python examples/biformer_model.py --weights biformer_tiny.pth --picture cat.jpg
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenmill as tm

TOPK = (1, 4, 16, None)  # regions in each stage; None: all pixels
HEAD_DIM = 32


@dataclass(frozen=True)
class Layout:
    """Blocks and channels of the four stages, and what else differs between the models."""

    depths: tuple[int, ...]
    channels: tuple[int, ...]
    mlp_ratio: int
    swin: bool = False  # patches that do not overlap, and no convolution for positions
    channels_first: bool = False


NARROW, WIDE = (64, 128, 256, 512), (96, 192, 384, 768)
MODELS = {
    "tiny": Layout((2, 2, 8, 2), NARROW, 3),
    "small": Layout((4, 4, 18, 4), NARROW, 3),
    "base": Layout((4, 4, 18, 4), WIDE, 3),
    "stl": Layout((2, 2, 6, 2), WIDE, 4, swin=True),
    "stl-channels-first": Layout((2, 2, 6, 2), WIDE, 4, swin=True, channels_first=True),
}


class Block(nn.Module):
    """[B, C, Y, X] to the same."""

    def __init__(self, layout: Layout, dim: int, topk: int | None) -> None:
        super().__init__()
        first, hidden = layout.channels_first, layout.mlp_ratio * dim
        self.channels_first = first
        self.pos_embed = None if layout.swin else nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = (
            nn.BatchNorm2d(dim) if first else nn.LayerNorm(dim, eps=1e-6) for _ in range(2)
        )
        self.attn = (
            tm.nn.AttentionLePE(dim, local="values" if first else "input")
            if topk is None
            else tm.nn.BiFormerAttention(
                dim, dim // HEAD_DIM, topk=topk, side_dwconv=5,
                padding="zeros" if first else "input",
            )
        )  # fmt: skip
        linear = functools.partial(nn.Conv2d, kernel_size=1) if first else nn.Linear
        between = [] if layout.swin else [nn.Identity()]  # it has a number in the published names
        self.mlp = nn.Sequential(linear(dim, hidden), *between, nn.GELU(), linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        if self.channels_first:
            x = x + channels_first(self.attn(channels_last(self.norm1(x))))
            return x + self.mlp(self.norm2(x))
        x = channels_last(x)
        x = x + self.attn(self.norm1(x))
        return channels_first(x + self.mlp(self.norm2(x)))


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks under the name that they have in the Swin layout."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class BiFormer(nn.Module):
    """Pictures [B, 3, Y, X] to logits [B, classes]."""

    def __init__(self, layout: Layout, classes: int = 1000) -> None:
        super().__init__()
        channels = layout.channels
        downsample = patches if layout.swin else convolutions
        pairs = zip((None, *channels[:-1]), channels, strict=True)
        self.downsample_layers = nn.ModuleList([downsample(*pair) for pair in pairs])
        stage = Stage if layout.swin else nn.Sequential
        self.stages = nn.ModuleList(
            [
                stage(*(Block(layout, dim, topk) for _ in range(depth)))
                for depth, dim, topk in zip(layout.depths, channels, TOPK, strict=True)
            ]
        )
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x).flatten(2).mean(2))


def convolutions(before: int | None, dim: int) -> nn.Sequential:
    """To half the side, the picture to a quarter."""
    half = functools.partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
    if before is not None:
        return nn.Sequential(half(before, dim), nn.BatchNorm2d(dim))
    first = (half(3, dim // 2), nn.BatchNorm2d(dim // 2), nn.GELU())
    return nn.Sequential(*first, half(dim // 2, dim), nn.BatchNorm2d(dim))


def patches(before: int | None, dim: int) -> nn.Sequential:
    if before is None:
        return nn.Sequential(nn.Conv2d(3, dim, 4, 4), nn.BatchNorm2d(dim))
    return nn.Sequential(nn.BatchNorm2d(before), nn.Conv2d(before, dim, 2, 2))


def load(model: BiFormer, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state.get("model", state))


def picture(path: Path | None, side: int) -> Tensor:
    """[1, 3, side, side], normalised as for ImageNet."""
    if path is None:
        return torch.randn(1, 3, side, side)
    import matplotlib.pyplot as plt

    pixels = torch.tensor(plt.imread(path).copy())[..., :3].permute(2, 0, 1)
    scaled = pixels / 255.0 if pixels.dtype == torch.uint8 else pixels.float()
    scaled = F.interpolate(scaled[None], (side, side), mode="bilinear", antialias=True)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--weights", type=Path, help="a published checkpoint; default: random ones")
    parser.add_argument("--picture", type=Path, help="default: noise; needs tokenmill[bench]")
    parser.add_argument("--side", type=int, default=224, help="pixels of a side")
    options = parser.parse_args()
    model = BiFormer(MODELS[options.model]).eval()
    if options.weights:
        load(model, options.weights)
    x = picture(options.picture, options.side)
    with torch.inference_mode():
        model(x)
        start = time.perf_counter()
        logits = model(x)
        spent = time.perf_counter() - start
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{options.model}: {count:.1f} M parameters, {options.side}x{options.side} pixels in "
          f"{spent * 1e3:.0f} ms")  # fmt: skip
    if options.weights and options.picture:
        best = logits[0].softmax(0).topk(5)
        for share, number in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"  class {number:>4}  {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
