"""Loss curves and attention maps of the language models, in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..dense.terms import Kind
from . import text
from .language_model import Run

COLOURS = {"softmax": "#2d5d7b", "sigmoid": "#c8553d"}
SMOOTHING = 15  # steps
BRIGHTEST = 0.995  # quantile of the weights of a map
Maps: TypeAlias = dict[Kind, Tensor]  # attention weights [B, H, S, S]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draws how the losses fell, and what the heads of each last layer look at."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    setup = runs[0].setup
    windows = text.characters()[1].unfold(0, setup.context, setup.context)[: setup.batch]
    maps: Maps = {}
    for run in runs:
        device = run.model.head.weight.device
        maps[run.kind] = run.model.weights(windows.to(device))[-1].cpu()
    heights = (4, 3.3 * len(runs))
    figure: Any = plt.figure(figsize=(3.1 * setup.heads, sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    losses, sums = top.subplots(1, 2, width_ratios=(3, 2))
    _draw_losses(losses, runs)
    _draw_sums(sums, maps)
    _draw_maps(bottom, maps)
    bottom.suptitle(
        f"weights of layer {setup.layers} for {setup.context} characters of validation text "
        "(black: 0, brightest: as in the titles, square-root scale)",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_losses(axes: Any, runs: Sequence[Run]) -> None:
    for place, run in enumerate(runs):
        colour, width = COLOURS[run.kind], (3.5, 1.5)[place > 0]  # both show where they coincide
        axes.plot(*_smooth(run.losses), color=colour, alpha=0.4, linewidth=1)
        steps, values = zip(*run.validation, strict=True)
        label = f"{run.kind}, validation ({values[-1]:.3f} at the end)"
        axes.plot(
            steps,
            values,
            color=colour,
            marker="o",
            markersize=2 * width,
            linewidth=width,
            label=label,
        )
    label = "frequencies of character pairs"
    axes.axhline(text.pair_loss(), color="grey", linestyle=":", linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per character")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(f"loss (pale: training, mean of {SMOOTHING} steps)", fontsize=11)


def _draw_sums(axes: Any, maps: Maps) -> None:
    for kind, weights in maps.items():
        for head, sums in enumerate(weights.sum(-1).mean(0)):
            label = f"{kind}, each head" if head == 0 else None
            axes.semilogy(sums.tolist(), color=COLOURS[kind], linewidth=1.2, label=label)
    axes.set_xlabel("query")
    axes.set_ylabel("sum of weights")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    batch = len(next(iter(maps.values())))
    axes.set_title(f"attention in all, mean of {batch} texts", fontsize=11)


def _draw_maps(figure: Any, maps: Maps) -> None:
    from matplotlib.colors import PowerNorm

    heads = next(iter(maps.values())).shape[1]
    grid = figure.subplots(len(maps), heads, squeeze=False, sharex=True, sharey=True)
    for row, (kind, weights) in zip(grid, maps.items(), strict=True):
        hidden = torch.ones(weights.shape[-2:], dtype=torch.bool).triu(1)
        for head, axes in enumerate(row):
            brightest = weights[0, head][~hidden].quantile(BRIGHTEST).clamp(min=1e-6).item()
            shown = weights[0, head].masked_fill(hidden, float("nan")).numpy()
            norm = PowerNorm(0.5, vmin=0, vmax=brightest)
            axes.imshow(shown, cmap="magma", norm=norm, interpolation="nearest")
            axes.set_title(f"{kind}, head {head + 1}, brightest {brightest:.2g}", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("query", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("key", fontsize=9)


def _smooth(losses: Sequence[float]) -> tuple[range, list[float]]:
    """Steps, and the mean of as many as SMOOTHING losses around each (fewer at both ends)."""
    half = SMOOTHING // 2
    around = [losses[max(i - half, 0) : i + half + 1] for i in range(len(losses))]
    return range(len(losses)), [sum(piece) / len(piece) for piece in around]
