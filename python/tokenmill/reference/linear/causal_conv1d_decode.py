"""causal_conv1d_decode: the next tokens of each request, behind the inputs in its slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .causal_conv1d import convolve


def causal_conv1d_decode(a: Any) -> tuple[Tensor]:
    """x [B, C] or [B, T, C], weight [C, W], bias [C]: out like x. state [slots, C, K] is updated in
    place.
    """
    x = a.x if a.x.dim() == 3 else a.x[:, None]
    slots = a.state_indices
    if slots is None:
        slots = torch.arange(x.shape[0], device=x.device)
    active = slots >= 0
    own = slots[active].long()
    columns, width = a.state.shape[-1], a.weight.shape[1]
    inputs = torch.cat([a.state[own], x[active].transpose(1, 2)], -1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if a.bias is None else a.bias.to(dtype)
    seen = inputs[..., columns - (width - 1) :].to(dtype)
    out = x.new_zeros(x.shape)
    out[active] = convolve(seen, a.weight.to(dtype), bias, a.activation).transpose(1, 2).to(x.dtype)
    a.state[own] = inputs[..., inputs.shape[-1] - columns :]
    return (out.view(a.x.shape),)
