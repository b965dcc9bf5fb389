"""causal_conv1d_decode: the next tokens of each request, behind the inputs in its slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import requests_of
from .causal_conv1d import convolve


def causal_conv1d_decode(a: Any) -> tuple[Tensor]:
    """x [B, C] or [B, T, C], weight [C, W], bias [C]: out like x. state [slots, C, K] is updated in
    place.
    """
    x = a.x if a.x.dim() == 3 else a.x[:, None]
    active, slots = requests_of(a, x)
    own = slots[active]
    columns, width = a.state.shape[-1], a.weight.shape[1]
    inputs = torch.cat([a.state[own], x[active].transpose(1, 2)], -1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if a.bias is None else a.bias.to(dtype)
    seen = inputs[..., columns - (width - 1) :].to(dtype)
    out = x.new_zeros(x.shape)
    out[active] = convolve(seen, a.weight.to(dtype), bias, a.activation).transpose(1, 2).to(x.dtype)
    kept = torch.full_like(slots, x.shape[1]) if a.accepted is None else a.accepted.long()
    newest = kept[active, None] + torch.arange(columns, device=x.device)
    a.state[own] = inputs.gather(-1, newest[:, None].expand(-1, x.shape[2], -1))
    return (out.view(a.x.shape),)
