"""Rotary position embedding for modules."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, angles: Tensor, *, interleaved: bool = False) -> Tensor:
    """x ``[.., N, H, D]`` rotated by angles ``[.., N, D / 2]``: pairs are channels i and i + D / 2,
    or, interleaved, 2 i and 2 i + 1.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
    if interleaved:
        a, b = wide[..., ::2], wide[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)
    a, b = wide.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def angles_at(at: Tensor, head_dim: int, base: float) -> Tensor:
    """float32 angles ``[.., D / 2]`` of positions: position times base^(-2 i / D)."""
    steps = torch.arange(0, head_dim, 2, device=at.device)
    return at[..., None].float() * base ** (-steps / head_dim)
