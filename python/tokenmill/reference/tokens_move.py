"""Tokens gathered, scattered, fused and pooled, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(x: Tensor, indices: Tensor) -> tuple[Tensor]:
    if indices.dim() == 1:
        rows, places = x.flatten(0, 1)[None], indices[None]
    else:
        rows, places = x, indices
    # A row of zeros behind the last serves -1.
    padded = torch.cat((rows, rows.new_zeros(len(rows), 1, rows.shape[2])), 1)
    found = padded[_places(places, rows.shape[1])]
    return (found[0] if indices.dim() == 1 else found,)


def scatter_tokens(
    y: Tensor, indices: Tensor, base: Tensor | None, batch: int, tokens: int
) -> tuple[Tensor]:
    channels = y.shape[-1]
    out = y.new_zeros(batch, tokens, channels) if base is None else base
    if indices.dim() == 1:
        rows, places, out = y[None], indices[None], out.reshape(1, batch * tokens, channels)
    else:
        rows, places = y, indices
    # A row behind the last takes what -1 names.
    padded = torch.cat((out, out.new_zeros(len(out), 1, channels)), 1)
    scattered = padded.index_put(_places(places, out.shape[1]), rows)[:, :-1]
    return (scattered.reshape(batch, tokens, channels).clone(),)


def gather_fuse(
    x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor, prefix: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    patches = x[:, prefix:]
    (kept,), (fused,) = gather_tokens(patches, keep), gather_tokens(patches, rest)
    (w,) = gather_tokens(weight[..., None], rest)
    total = w.sum(1)
    f = (w * fused).sum(1)
    if normalize:
        empty = total == 0
        f = torch.where(empty, 0.0, f / torch.where(empty, 1.0, total))
    out = torch.cat((x[:, :prefix], kept, f[:, None].to(x.dtype)), 1)
    return out, total[:, 0]


def local_pool(
    x: Tensor,
    mask: Tensor | None,
    kernel_y: int,
    kernel_x: int,
    dilation_y: int,
    dilation_x: int,
    pooling: str,
    count_include_pad: bool,
    subtract_input: bool,
) -> tuple[Tensor]:
    if mask is None:
        mask = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device)
    window = [
        (dilation_y * (i - kernel_y // 2), dilation_x * (j - kernel_x // 2))
        for i in range(kernel_y)
        for j in range(kernel_x)
    ]
    counted = torch.stack([_shifted(mask[..., None], *offset) for offset in window])
    taps = torch.stack([_shifted(x, *offset) for offset in window])
    count = counted.sum(0)
    if pooling == "avg":
        divisor = len(window) if count_include_pad else count.clamp(min=1)
        pooled = torch.where(counted, taps, 0.0).sum(0) / divisor
    else:
        taps = torch.where(counted, taps, -torch.inf)
        most = taps.detach().amax(0)
        attains = counted & ((taps == most) | (taps != taps))
        pooled = taps.gather(0, attains.int().argmax(0, keepdim=True))[0]
    pooled = torch.where(count > 0, pooled, 0.0)
    return (pooled - x if subtract_input else pooled,)


def _places(indices: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequence and token of each entry."""
    sequence = torch.arange(len(indices), device=indices.device)[:, None]
    return sequence, torch.where(indices < 0, tokens, indices).long()


def _shifted(x: Tensor, dy: int, dx: int) -> Tensor:
    """[B, Y, X, C] that holds x at (y + dy, x + dx) in place of (y, x), and 0 beyond the map."""
    height, width = x.shape[1:3]
    out = torch.zeros_like(x)
    y, y_end = max(0, -dy), min(height, height - dy)
    left, right = max(0, -dx), min(width, width - dx)
    if y < y_end and left < right:
        out[:, y:y_end, left:right] = x[:, y + dy : y_end + dy, left + dx : right + dx]
    return out
