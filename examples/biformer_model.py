"""A published BiFormer model on a picture.

Parameters have the published names and shapes, so that a published checkpoint loads strictly. Three
of the five models are from the paper (tiny, small, base), and two have the layout of Swin-T:
"stl", and "stl-channels-first", whose blocks see maps [B, C, Y, X]. Without weights they are
random, and only the time of an image is meaningful.

    python examples/biformer_model.py --model small
    python examples/biformer_model.py --weights biformer_tiny.pth --picture cat.jpg
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm

MODELS = {
    "tiny": tm.nn.biformer_tiny,
    "small": tm.nn.biformer_small,
    "base": tm.nn.biformer_base,
    "stl": tm.nn.biformer_stl,
    "stl-channels-first": functools.partial(tm.nn.biformer_stl, channels_first=True),
}


def load(model: tm.nn.BiFormer, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state.get("model", state))


def picture(path: Path | None, side: int) -> Tensor:
    """Image [1, 3, side, side], normalized as for ImageNet."""
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
    model = MODELS[options.model]().eval()
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
