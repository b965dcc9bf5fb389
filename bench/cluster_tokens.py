"""Cases of cluster_tokens, compute-bound. Eager code has a matrix of all pixels and clusters,
masked to the window."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place

TAU = 0.005


def eager_clusters(x: Tensor, grid: int, iters: int, reach: Tensor) -> tuple[Tensor, Tensor]:
    """reach: additive mask, 0 or -inf."""
    pixels = x.flatten(1, 2)
    c = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (grid, grid)).flatten(2).mT
    squares = pixels.square().sum(2, keepdim=True)

    def distances() -> Tensor:
        return squares + c.square().sum(2)[:, None] - 2 * pixels @ c.mT

    for _ in range(iters):
        q = torch.softmax(reach - TAU * distances(), 2)
        c = q.mT @ pixels / q.sum(1).clamp(min=1e-16)[..., None]
    return c, distances().argmin(2)


def in_reach(side: int, grid: int, window: int) -> Tensor:
    home = torch.arange(side) * grid // side
    near = (home[:, None] - torch.arange(grid)).abs() <= window // 2
    both = near[:, None, :, None] & near[None, :, None, :]
    return both.flatten(2).flatten(0, 1)


def _case(side: int, grid: int, channels: int, dtype: torch.dtype, window_labels: bool) -> Case:
    iters, window = 5, 7

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        x = place(torch.randn(1, side, side, channels, generator=generator).to(dtype))
        near = in_reach(side, grid, window)
        reach = place(torch.zeros(near.shape).masked_fill(~near, -torch.inf).to(dtype))
        return lambda: tm.cluster_tokens(x, grid, tau=TAU, window_labels=window_labels), {
            "eager, all clusters": lambda: lambda: eager_clusters(x, grid, iters, reach),
        }

    reached = min(window, grid) ** 2
    labelled = reached if window_labels else grid * grid
    pixels = side * side
    work = pixels * channels * (5.0 * reached * iters + 3.0 * labelled)
    labels = ", labels of the window" if window_labels else ""
    return Case(
        "cluster_tokens",
        f"{side}x{side} to {grid}x{grid}, C={channels}{labels}",
        dtype,
        work,
        float(iters * (pixels + 2 * grid * grid) * channels * dtype.itemsize),
        prepare,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(64, 32, 192, dtype, False)
        yield _case(64, 32, 384, dtype, False)
        yield _case(64, 32, 384, dtype, True)
