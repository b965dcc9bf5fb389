"""Lowering rules from public functions to schemas, shared by several operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._check import as_number


def scale_or_default(op: str, scale: float | None, q: Tensor) -> float:
    """scale, with 1 / sqrt(D) for None."""
    if scale is None:
        return 1.0 / math.sqrt(int(q.size(-1)) or 1) if q.dim() else 1.0
    return as_number(op, "scale", scale)


def widen(t: Tensor, q: Tensor) -> Tensor:
    """A small tensor in float32, or in float64 with a float64 q."""
    if not t.is_floating_point():
        return t
    return t.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
