"""Token reduction in a vision transformer: what its features lose, and how much faster it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from .._check import check, needs
from .run import now
from .table import table

NAME = "evaluation.evaluate_vision"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet statistics
ROUNDS = 3  # timed calls, of which the best counts


@dataclass(frozen=True)
class VisionRow:
    """One reduction at one size.

    Attributes:
        name: of the reduction.
        pixels: height and width of the images.
        tokens, kept: rows before the first layer and after the last.
        class_cosine: of each image, between the first token of the last hidden states and that of
            the model as it is.
        patch_cosine: the same of all patches, each with the row that it was merged into; NaN where
            patches were dropped.
        saliency: correlation of the maps of all images; NaN without a decoder or with dropped
            patches.
        rate, speed: images per second, and the ratio to the model as it is.
    """

    name: str
    pixels: int
    tokens: int
    kept: int
    class_cosine: list[float]
    patch_cosine: list[float]
    saliency: float
    rate: float
    speed: float


def evaluate_vision(
    model: Any,
    images: Tensor,
    reductions: Mapping[str, Mapping[str, Any]],
    *,
    pixels: Sequence[int] = (224,),
    after: Callable[[VisionRow], None] = lambda row: None,
) -> list[VisionRow]:
    """Judges token reductions against the model as it is.

    Args:
        model: a vision model that :func:`tokenmill.integrations.transformers.patch` takes, or
            :class:`tokenmill.samples.models.SaliencyModel`.
        images: float ``[B, 3, H, W]``, 0 to 1; resized and normalised with ImageNet's mean and
            deviation.
        reductions: arguments of patch, by name: ``{"ToMe 8": {"merge": 8}}``.
        pixels: heights and widths of the squares that the model sees.
        after: called with each row.

    Returns:
        For each size a row of the model as it is, then one of each reduction.

    Raises:
        RuntimeError: naming argument, rule and value.

    Example:
        >>> from tokenmill.samples import models
        >>> from tokenmill.evaluation import evaluate_vision, photographs
        >>> rows = evaluate_vision(models.dinov2(), photographs(), {"ToMe 8": {"merge": 8}})
        >>> [(row.name, row.kept) for row in rows], min(rows[1].class_cosine) > 0.999
        ([('model', 257), ('ToMe 8', 161)], True)
    """
    shaped = images.dim() == 4 and images.shape[1] == 3 and images.is_floating_point()
    check(shaped, NAME, "images", "must be float [B, 3, H, W]", tuple(images.shape))
    check(not model.training, NAME, "model", "must be in evaluation mode", "training")
    backbone = getattr(model, "backbone", model)
    rows = []
    for size in pixels:
        seen = resized(images, size).to(backbone.device, backbone.dtype)
        whole, seconds = timed(backbone, seen)
        count = whole.shape[1]
        ones = [1.0] * len(images)
        rate = len(images) / seconds
        rows.append(VisionRow("model", size, count, count, ones, ones, 1.0, rate, 1.0))
        after(rows[-1])
        for name, options in reductions.items():
            rows.append(judge(model, backbone, seen, whole, seconds, name, options))
            after(rows[-1])
    return rows


def judge(
    model: Any, backbone: Any, seen: Tensor, whole: Tensor, seconds: float, name: str,
    options: Mapping[str, Any],
) -> VisionRow:  # fmt: skip
    from ..integrations.transformers import patch, unpatch

    reduction = patch(backbone, **options)
    try:
        found, mine = timed(backbone, seen)
        size, batch = seen.shape[2], len(seen)
        patches, same = [math.nan] * batch, math.nan
        if reduction.merge is not None:
            every = reduction.unmerge(found)
            inner = [x[:, reduction.prefix :] for x in (every, whole)]
            patches = cosine_similarity(inner[0], inner[1], dim=-1).mean(1).tolist()
            if hasattr(model, "saliency"):
                with torch.inference_mode():
                    maps = [model.saliency(x, size, size).flatten() for x in inner]
                same = torch.corrcoef(torch.stack(maps).float())[0, 1].item()
    finally:
        unpatch(backbone)
    first = cosine_similarity(found[:, 0], whole[:, 0], dim=-1).tolist()
    kept, tokens = found.shape[1], whole.shape[1]
    return VisionRow(name, size, tokens, kept, first, patches, same, batch / mine, seconds / mine)


def timed(backbone: Any, seen: Tensor) -> tuple[Tensor, float]:
    """The last hidden states, and the seconds of the fastest call."""
    times = []
    with torch.inference_mode():
        for _ in range(1 + ROUNDS):
            start = now(seen.device)
            found: Tensor = backbone(seen).last_hidden_state
            times.append(now(seen.device) - start)
    return found, min(times[1:])


def resized(images: Tensor, size: int) -> Tensor:
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (MEAN, DEVIATION))
    small = interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return (small - mean) / deviation


def photographs() -> Tensor:
    """The two photographs that scikit-learn has, cut to squares: [2, 3, 427, 427], 0 to 1."""
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as missing:
        raise needs("models", missing) from missing
    found = []
    for image in load_sample_images().images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1) / 255
        side = min(pixels.shape[1:])
        top, left = ((n - side) // 2 for n in pixels.shape[1:])
        found.append(pixels[:, top : top + side, left : left + side])
    return torch.stack(found)


HEADER = ("reduction", "pixels", "tokens", "class", "patches", "saliency", "images/s", "speed")


def vision_markdown(rows: Sequence[VisionRow]) -> str:
    """A table with a line for each row: means over images."""

    def show(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.4f}"

    return table(
        HEADER,
        (
            (
                row.name,
                str(row.pixels),
                f"{row.kept} of {row.tokens}",
                show(statistics.mean(row.class_cosine)),
                show(statistics.mean(row.patch_cosine)),
                show(row.saliency),
                f"{row.rate:.1f}",
                f"{row.speed:.2f}",
            )
            for row in rows
        ),
    )
