"""local_pool: the mean or maximum of the unmasked pixels of a window, optionally minus the pixel
itself.

    (y, x): pixels (y + dilation_y (i - kernel_y // 2), x + dilation_x (j - kernel_x // 2))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def local_pool(a: Any) -> tuple[Tensor]:
    """x [B, Y, X, C], mask [B, Y, X] or None."""
    x, mask = a.x, a.mask
    if mask is None:
        mask = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device)
    window = [
        (a.dilation_y * (i - a.kernel_y // 2), a.dilation_x * (j - a.kernel_x // 2))
        for i in range(a.kernel_y)
        for j in range(a.kernel_x)
    ]
    counted = torch.stack([_shifted(mask[..., None], *offset) for offset in window])
    taps = torch.stack([_shifted(x, *offset) for offset in window])
    count = counted.sum(0)
    if a.pooling == "avg":
        divisor = len(window) if a.count_include_pad else count.clamp(min=1)
        pooled = torch.where(counted, taps, 0.0).sum(0) / divisor
    else:
        taps = torch.where(counted, taps, -torch.inf)
        maximum = taps.detach().amax(0)
        attains = counted & ((taps == maximum) | (taps != taps))
        pooled = taps.gather(0, attains.int().argmax(0, keepdim=True))[0]
    pooled = torch.where(count > 0, pooled, 0.0)
    return (pooled - x if a.subtract_input else pooled,)


def _shifted(x: Tensor, dy: int, dx: int) -> Tensor:
    """[B, Y, X, C] with x at (y + dy, x + dx) in position (y, x), and 0 beyond the map."""
    height, width = x.shape[1:3]
    out = torch.zeros_like(x)
    y, y_end = max(0, -dy), min(height, height - dy)
    left, right = max(0, -dx), min(width, width - dx)
    if y < y_end and left < right:
        out[:, y:y_end, left:right] = x[:, y + dy : y_end + dy, left + dx : right + dx]
    return out
