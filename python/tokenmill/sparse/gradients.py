"""What the backward passes of attention to lists share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cotangents(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Cotangents as the operators take them."""
    if dout is None:
        dout = torch.zeros_like(out)
    if dout.stride(-1) != 1:  # e.g. the expanded gradient of a sum
        dout = dout.contiguous()
    return dout, None if dlse is None else dlse.contiguous()


def fake_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake gradients of q, k and v."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
