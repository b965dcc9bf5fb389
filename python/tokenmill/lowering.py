"""How arguments of public functions become those of a schema, where several operators agree."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .check import fail


def scale_or_default(op: str, scale: float | None, q: Tensor) -> float:
    """1 / sqrt(D) for None."""
    if scale is None:
        return 1.0 / math.sqrt(max(int(q.shape[-1]), 1)) if q.dim() else 1.0
    if not isinstance(scale, int | float):
        fail(op, "scale", "must be a number", scale)
    return float(scale)


def widen(t: Tensor, q: Tensor) -> Tensor:
    """A small tensor in float32, or in float64 beside a float64 q."""
    if not t.is_floating_point():
        return t
    wide = torch.promote_types(q.dtype, torch.float32) if q.is_floating_point() else torch.float32
    return t.to(wide)
