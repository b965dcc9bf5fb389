"""A vision transformer with token merging, and the fate of each patch.

The weights are random: merged patches are similar under a random projection, which is enough for
timing a call and for seeing where tokens go. It says nothing about accuracy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .encoder import now

SIDE, PATCH, WIDTH, LAYERS = 224, 16, 192, 12
BATCH = 8
MERGE = 13  # tokens per layer, out of 197


@dataclass(frozen=True)
class Merged:
    """One image through the stock model and the patched model."""

    image: Tensor  # [3, SIDE, SIDE], 0 to 1
    source: Tensor  # [patches], the result row of each patch
    rows: int  # number of result rows, without the class token
    rate: float  # images per second
    stock_rate: float

    @property
    def grid(self) -> int:
        return int(len(self.source) ** 0.5)


def image(side: int = SIDE) -> Tensor:
    """A hill at dusk: uniform areas, and edges."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    sky = torch.stack([0.35 + 0.75 * y, 0.5 + 0.25 * y, 0.72 - 0.3 * y])
    ridge = 0.62 + 0.1 * torch.sin(5.2 * x) + 0.03 * torch.sin(17 * x)
    hill = torch.stack([0.12 + 0.1 * x, 0.3 + 0.25 * (y - 0.5), 0.2 - 0.05 * x])
    picture = torch.where(y > ridge, hill, sky)
    sun = (x - 0.72) ** 2 + (y - 0.27) ** 2 < 0.012
    picture = torch.where(sun, torch.tensor([1.0, 0.9, 0.55])[:, None, None], picture)
    house = (x > 0.2) & (x < 0.36) & (y > 0.55) & (y < 0.75)
    picture = torch.where(house, torch.tensor([0.75, 0.28, 0.2])[:, None, None], picture)
    window = (x > 0.25) & (x < 0.3) & (y > 0.6) & (y < 0.66)
    return torch.where(window, torch.tensor([1.0, 0.95, 0.7])[:, None, None], picture).clamp(0, 1)


def merge(
    *, device: str = "cpu", backend: str | None = None, seconds: float = 3.0,
    side: int = SIDE, layers: int = LAYERS, batch: int = BATCH,
) -> Merged:  # fmt: skip
    """Times the stock model and the patched model alternately for about `seconds`."""
    from transformers import ViTConfig, ViTForImageClassification

    from ..integrations.transformers import patch, unpatch

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=WIDTH // 64,
        image_size=side,
        patch_size=PATCH,
    )
    model: Any = ViTForImageClassification(config).eval().to(device)
    picture = image(side)
    images = (picture * 2 - 1).expand(batch, -1, -1, -1).contiguous().to(device)
    tokens = (side // PATCH) ** 2 + 1
    count = min(MERGE, tokens // (layers + 1))
    times: dict[bool, list[float]] = {False: [], True: []}
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end or len(times[True]) < 2:
            times[False].append(_call(model, images))
            reduction = patch(model, merge=count, backend=backend)
            times[True].append(_call(model, images))
            source = reduction.source[0, 1:].cpu()
            rows = len(torch.unique(source))
            unpatch(model)
    stock, ours = (batch / min(found) for found in times.values())
    return Merged(picture, source, rows, ours, stock)


def _call(model: Any, images: Tensor) -> float:
    start = now(images.device)
    model(images)
    return now(images.device) - start
