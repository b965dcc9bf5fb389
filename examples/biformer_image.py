"""Which regions of a photograph attend to which, and what that costs.

Cuts a real photograph (the one that matplotlib ships, or --picture) into patches of 4x4 pixels and
sends them through the attention of BiFormer. No trained weights are at hand: queries and keys are
the same random projection of the patches, so that regions are routed to those that look like them.
For pictures of 224x224, 600x500 and 1024x1024 pixels it prints time and peak memory of forward and
backward, next to the published formulation, which gathers a copy of the keys and values of every
routed region. A minute on two cores.

    python examples/biformer_image.py --plot regions.png     # needs tokenmill[bench]
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm
from tokenmill.bench.bilevel_routing_attention import gathered_attention, routed

PATCH, HEADS, DIM, REGIONS = 4, 2, 32, 7


def photograph(path: Path | None) -> Tensor:
    """Image [3, Y, X] with values 0 to 1."""
    import matplotlib.pyplot as plt
    from matplotlib.cbook import get_sample_data

    if path is None:
        with get_sample_data("grace_hopper.jpg") as file:
            pixels = plt.imread(file, format="jpg")
    else:
        pixels = plt.imread(path)
    picture = torch.tensor(pixels.copy())[..., :3].permute(2, 0, 1)
    return picture / 255.0 if picture.dtype == torch.uint8 else picture.float()


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0].clamp(
        0, 1
    )


def embedded(picture: Tensor) -> list[Tensor]:
    """Queries, keys and values [1, Y, X, heads, D] of patches; queries and keys are the same."""
    patches = F.pixel_unshuffle(picture, PATCH).permute(1, 2, 0)  # [Y, X, 48]
    patches = (patches - patches.mean((0, 1))) / patches.std()
    g = torch.Generator().manual_seed(0)
    project, values = (torch.randn(48, HEADS * DIM, generator=g) / 48**0.5 for _ in range(2))
    q, v = (patches @ w for w in (project, values))
    return [t.unflatten(-1, (HEADS, DIM))[None] for t in (q, q, v)]


def region_size(x: Tensor) -> tuple[int, int]:
    return -(-x.shape[1] // REGIONS), -(-x.shape[2] // REGIONS)


def attend(x: list[Tensor], topk: int) -> tuple[Tensor, Tensor]:
    return tm.bilevel_routing_attention(
        *x, region_size=region_size(x[0]), topk=topk, mask_padding=False, return_graph=True
    )


def gather(x: list[Tensor], topk: int) -> Tensor:
    region = region_size(x[0])
    return gathered_attention(*x, routed(x[0], x[1], region, topk), region, DIM**-0.5)


FORWARDS = {"tokenmill": lambda x, topk: attend(x, topk)[0], "gather": gather}


def call(name: str, x: list[Tensor], topk: int, backward: bool) -> object:
    if not backward:
        return FORWARDS[name](x, topk)
    leaves = [t.detach().requires_grad_() for t in x]
    return torch.autograd.grad(FORWARDS[name](leaves, topk).sum(), leaves)


def seconds(*args: Any) -> float:
    call(*args)
    best, spent = math.inf, 0.0
    while spent < 0.5:
        start = time.perf_counter()
        call(*args)
        last = time.perf_counter() - start
        best, spent = min(best, last), spent + last
    return best


def peak(*args: Any) -> int | None:
    """Bytes that the first call of this process allocates at its peak; None if the system does not
    report it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to current usage
        before = held_at_most()
        call(*args)
        return held_at_most() - before
    except OSError:
        return None


def held_at_most() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(x: list[Tensor], topk: int) -> None:
    torch.testing.assert_close(attend(x, topk)[0], gather(x, topk), rtol=1e-3, atol=1e-4)
    for name in FORWARDS:
        for backward in (False, True):
            args = (name, x, topk, backward)
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                extra = fresh.apply(peak, args)
            shown = "" if extra is None else f", {extra / 2**20:.1f} MiB more"
            title = f"{name}, backward too" if backward else name
            print(f"  {title:<25} {seconds(*args) * 1e3:8.2f} ms{shown}")


def plot(picture: Tensor, x: list[Tensor], topk: int, path: Path) -> None:
    """Plots four regions, and the regions that they attend to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    graph = attend(x, topk)[1][0, 0]
    height, width = (PATCH * n for n in region_size(x[0]))
    columns = -(-picture.shape[2] // width)
    rows = -(-picture.shape[1] // height)
    regions = [columns // 2, columns * (rows // 3) + 1, columns * (rows // 2) + columns // 2]
    regions.append(columns * (rows - 1) + columns // 2)
    figure, axes = plt.subplots(1, 4, figsize=(13, 4.2), layout="constrained")
    for axis, region in zip(axes, regions, strict=True):
        axis.imshow(picture.permute(1, 2, 0), alpha=0.75)
        for number, colour, line in (*((n, "#2d5d7b", 2) for n in graph[region].tolist()),
                                     (region, "#c8553d", 3)):  # fmt: skip
            corner = (number % columns * width, number // columns * height)
            axis.add_patch(Rectangle(corner, width, height, fill=False, ec=colour, lw=line))
        axis.set_axis_off()
    figure.suptitle("Regions (red) and those that they attend to (blue)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--picture", type=Path, help="a picture; default: one from matplotlib")
    parser.add_argument("--topk", type=int, default=4, help="regions that each attends to")
    parser.add_argument("--quick", action="store_true", help="only the smallest picture")
    parser.add_argument("--plot", type=Path, help="draw the routed regions over the picture")
    options = parser.parse_args()
    picture = photograph(options.picture)
    sizes = [(224, 224)] if options.quick else [(224, 224), (600, 500), (1024, 1024)]
    for height, width in sizes:
        x = embedded(resized(picture, height, width))
        held = sum(t.nbytes for t in x) + x[2].nbytes
        print(f"{height}x{width} pixels, map {x[0].shape[1]}x{x[0].shape[2]}, "
              f"inputs and output {held / 2**20:.1f} MiB")  # fmt: skip
        measure(x, options.topk)
    if options.plot:
        scaled = resized(picture, 600, 500)
        plot(scaled, embedded(scaled), options.topk, options.plot)
        print(f"drawn: {options.plot}")


if __name__ == "__main__":
    main()
