"""DINOv2 with token merging: the fate of each patch, and the saliency map before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evaluation import evaluate_vision, photographs
from ..evaluation.vision import VisionRow, resized
from ..integrations.transformers import patch, unpatch
from ..samples import models

SIDE = 448  # pixels
MERGE = 64  # tokens that each layer merges, of 1025


@dataclass(frozen=True)
class Merged:
    """A photograph through the model as it is and through the model that merges.

    Attributes:
        image: ``[3, SIDE, SIDE]``, 0 to 1.
        source: ``[patches]``, the row of the last layer that each patch is in.
        before, after: ``[SIDE, SIDE]``, saliency of the whole and of the merged model.
        row: cosines, correlation and speed over all photographs.
    """

    image: Tensor
    source: Tensor
    before: Tensor
    after: Tensor
    row: VisionRow

    @property
    def grid(self) -> int:
        return int(len(self.source) ** 0.5)

    @property
    def rows(self) -> int:
        """Rows of the last layer, without the class token."""
        return len(torch.unique(self.source))


@torch.inference_mode()
def merge(
    *, device: str = "cpu", backend: str | None = None, side: int = SIDE, merged: int = MERGE
) -> Merged:
    model = models.dinov2().to(device)
    images = photographs()
    options: dict[str, Any] = {"merge": merged, "backend": backend}
    _, row = evaluate_vision(model, images, {f"merge={merged}": options}, pixels=[side])
    pixels = resized(images[:1], side).to(device)
    before = model(pixels)
    reduction = patch(model.backbone, **options)
    try:
        found = reduction.unmerge(model.backbone(pixels).last_hidden_state)
        source = reduction.source[0, 1:].cpu()
    finally:
        unpatch(model.backbone)
    after = model.saliency(found[:, 1:], side, side)
    shown = torch.nn.functional.interpolate(images[:1], (side, side), mode="area")[0]
    return Merged(shown, source, before[0].cpu(), after[0].cpu(), row)
