"""lightning_slopes: decay slopes of published lightning attention models."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .._check import as_int, check, check_choice, fail

OP = "lightning_slopes"
MAX_HEADS = 65536


def lightning_slopes(
    num_heads: int,
    layer: int | None = None,
    num_layers: int | None = None,
    *,
    convention: Literal["minimax", "paper"] = "minimax",
) -> Tensor:
    r"""Slopes for :func:`lightning_attention`, in one of the two conventions in use.

    Models trained with one do not work with the other. For head h of H (from 0) and layer l of L:

    - "minimax" (the authors' code, TransNormerLLM, MiniMax-01): :math:`2^{-8(h+1)/H}`, as in
      ALiBi, times :math:`1 - l/(L-1) + 10^{-5}`. Where H is not a power of two, the slopes of the
      next smaller power of two are followed by every other slope of the next larger one.
    - "paper" (the formula of TransNormerLLM, flash-linear-attention): :math:`(8h/H)(1 - l/L)`,
      linear in h; head 0 does not decay.

    Args:
        num_heads: H, up to 65536.
        layer, num_layers: l (from 0) and L; None for both: no layer factor.
        convention: "minimax" or "paper".

    Returns:
        ``[H]`` float32 on the CPU, nonnegative; the weight of a token n tokens back is
        :math:`e^{-slope\,n}`.

    Raises:
        RuntimeError: naming argument, rule and value.

    Complexity: O(H).

    Paper: TransNormerLLM (Qin et al. 2023), section 3.1; MiniMax-01 (2025).

    Example:
        >>> import tokenmill as tm
        >>> tm.lightning_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])
        >>> tm.lightning_slopes(4, layer=0, num_layers=2, convention="paper")
        tensor([0., 2., 4., 6.])
    """
    num_heads = as_int(OP, "num_heads", num_heads, minimum=1, maximum=MAX_HEADS)
    factor = _layer_factor(layer, num_layers, convention)
    if convention == "paper":
        slopes = [8.0 * h / num_heads for h in range(num_heads)]
    else:
        slopes = alibi_slopes(num_heads)
    return torch.tensor([slope * factor for slope in slopes], dtype=torch.float32)


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8 (h + 1) / H), interpolated where H is not a power of two."""
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / below) for h in range(below)]
    between = [2.0 ** (-4.0 * (h + 1) / below) for h in range(0, 2 * below, 2)]
    return slopes + between[: num_heads - below]


def _layer_factor(layer: int | None, num_layers: int | None, convention: str) -> float:
    check_choice(OP, "convention", convention, "minimax", "paper")
    if layer is None and num_layers is None:
        return 1.0
    rule = "must be an integer, as its counterpart is given"
    layer = as_int(OP, "layer", layer, rule)
    num_layers = as_int(OP, "num_layers", num_layers, rule)
    check(num_layers >= 1, OP, "num_layers", "must be at least 1", num_layers)
    if not 0 <= layer < num_layers:
        fail(OP, "layer", f"must be from 0 to {num_layers - 1}", layer)
    if convention == "paper":
        return 1 - layer / num_layers
    return 1 - layer / max(num_layers - 1, 1) + 1e-5
