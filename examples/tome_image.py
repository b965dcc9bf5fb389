"""How few tokens a photograph needs, and what merging them costs.

Cuts a real photograph (the one that matplotlib ships, or --picture) into patches of 4x4 pixels and
merges a quarter of the tokens at a time, as layers with nn.TokenMerging do. No trained weights are
at hand: a token is its pixels, and tokens are compared by pixels and place. Each token stands for
the mean of the tokens merged into it, so the picture of the remaining tokens can be drawn; the
baseline is the same number of random tokens, into which their neighbors in the row are merged. Also
prints how long matching, merging and unmerging take compared with eager PyTorch, and the attention
that they save. Half a minute on two cores.

    python examples/tome_image.py --plot merged.png     # needs tokenmill[bench]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm

PATCH, HEADS, DIM = 4, 6, 64


class Merged(NamedTuple):
    tokens: Tensor  # [1, M, C]
    source: Tensor  # [1, N]: the row of each patch

    def picture(self, height: int, width: int) -> Tensor:
        """Image [3, Y, X] of the rows that the patches are in."""
        patches = tm.unmerge_tokens(self.tokens, self.source)[0]
        return F.pixel_shuffle(patches.T.unflatten(1, (height // PATCH, width // PATCH)), PATCH)


def photograph(path: Path | None, side: int) -> Tensor:
    """Image [3, Y, X] with values 0 to 1, Y and X multiples of PATCH."""
    import matplotlib.pyplot as plt
    from matplotlib.cbook import get_sample_data

    if path is None:
        with get_sample_data("grace_hopper.jpg") as file:
            pixels = plt.imread(file, format="jpg")
    else:
        pixels = plt.imread(path)
    picture = torch.tensor(pixels.copy())[..., :3].permute(2, 0, 1)
    picture = picture / 255.0 if picture.dtype == torch.uint8 else picture.float()
    size = [max(n * side // max(picture.shape[1:]) // PATCH, 2) * PATCH for n in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def patches_of(picture: Tensor) -> Tensor:
    return F.pixel_unshuffle(picture, PATCH).flatten(1).T[None].contiguous()


def places_of(height: int, width: int) -> Tensor:
    """Coordinates [1, N, 2], -1 to 1 along the longer side."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (2 * torch.stack([y, x], -1) / max(height, width) - 1).flatten(0, 1)[None]


def merged(picture: Tensor, layers: int) -> list[Merged]:
    """The tokens after each layer, a quarter fewer than after the previous one."""
    tokens = patches_of(picture)
    places = places_of(*(n // PATCH for n in picture.shape[1:]))
    size = source = None
    found = []
    for _ in range(layers):
        metric = torch.cat([tokens - 0.5, 4 * places, torch.ones_like(places)], 2)
        layer = tm.nn.TokenMerging(tokens.shape[1] // 4, class_token=False)
        both, size, source = layer(torch.cat([tokens, places], 2), metric, size, source)
        tokens, places = both.split([tokens.shape[2], 2], 2)
        found.append(Merged(tokens, source))
    return found


def at_random(picture: Tensor, count: int) -> Merged:
    patches = patches_of(picture)
    kept = torch.randperm(patches.shape[1] - 1, generator=torch.Generator().manual_seed(0)) + 1
    first = torch.zeros(patches.shape[1], dtype=torch.int32)
    first[kept[: count - 1]] = 1
    source = first.cumsum(0, dtype=torch.int32)[None]
    return Merged(tm.merge_tokens(patches, source, count)[0], source)


def decibels(picture: Tensor, other: Tensor) -> float:
    return -10 * math.log10((picture - other).square().mean().item())


def eager_merging(x: Tensor, r: int) -> Tensor:
    """Match, merge and unmerge, as published code does."""
    unit = x / x.norm(dim=-1, keepdim=True)
    best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    gone, left = order[:, :r], order[:, r:]
    to = partner[..., None].gather(1, gone)
    wide = [t.expand(-1, -1, x.shape[2]) for t in (gone, left, to)]
    source, target = x[:, ::2], x[:, 1::2]
    target = target.scatter_reduce(1, wide[2], source.gather(1, wide[0]), reduce="mean")
    out = torch.empty_like(x)
    out[:, 1::2] = target
    out[:, ::2] = source.scatter(1, wide[0], target.gather(1, wide[2]))
    return out


def merging(x: Tensor, r: int) -> Tensor:
    assign, rows, _ = tm.bipartite_match(x, r)
    return tm.unmerge_tokens(tm.merge_tokens(x, assign, rows)[0], assign)


def seconds(call: Callable[[], object]) -> float:
    call()
    best, spent = math.inf, 0.0
    while spent < 0.5:
        start = time.perf_counter()
        call()
        last = time.perf_counter() - start
        best, spent = min(best, last), spent + last
    return best


def measure(tokens: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, HEADS * DIM, generator=g)
    q = x.unflatten(2, (HEADS, DIM))
    few = q[:, : tokens // 2].contiguous()
    r = tokens // 2
    torch.testing.assert_close(merging(x, r), eager_merging(x, r), rtol=1e-4, atol=1e-5)
    times = {
        "merging": seconds(lambda: merging(x, r)),
        "eager merging": seconds(lambda: eager_merging(x, r)),
        "attention": seconds(lambda: tm.attention(q, q, q)),
        "of half": seconds(lambda: tm.attention(few, few, few)),
    }
    print(f"  {tokens:5} tokens: " + ", ".join(f"{n} {s * 1e3:.2f} ms" for n, s in times.items()))


def plot(picture: Tensor, found: list[Merged], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [picture, *(m.picture(*picture.shape[1:]) for m in found[1::2])]
    counts = [found[0].source.shape[1], *(m.tokens.shape[1] for m in found[1::2])]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.3 * len(shown), 4.4), layout="constrained"
    )
    for axis, image, count in zip(axes, shown, counts, strict=True):
        axis.imshow(image.permute(1, 2, 0).clamp(0, 1))
        axis.set_title(f"{count} tokens", fontsize=10)
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--picture", type=Path, help="a picture; default: one from matplotlib")
    parser.add_argument("--layers", type=int, default=8, help="a quarter fewer tokens after each")
    parser.add_argument("--quick", action="store_true", help="a small picture")
    parser.add_argument("--plot", type=Path, help="draw the tokens that are left")
    options = parser.parse_args()
    picture = photograph(options.picture, 112 if options.quick else 448)
    found = merged(picture, options.layers)
    print(f"{picture.shape[1]}x{picture.shape[2]} pixels, {found[0].source.shape[1]} patches")
    for m in found:
        count = m.tokens.shape[1]
        pictures = (m.picture(*picture.shape[1:]),
                    at_random(picture, count).picture(*picture.shape[1:]))  # fmt: skip
        like, random = (decibels(picture, p) for p in pictures)
        print(f"  {count:5} tokens: {like:.1f} dB, at random {random:.1f} dB")
    print(f"half of the tokens, {HEADS} heads of {DIM}, {torch.get_num_threads()} threads")
    for tokens in (196,) if options.quick else (196, 784, 3136):
        measure(tokens)
    if options.plot:
        plot(picture, found, options.plot)
        print(f"drawn: {options.plot}")


if __name__ == "__main__":
    main()
