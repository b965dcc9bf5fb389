"""Host side of causal_conv1d_decode."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ..common import INTERPRETED, launch
from .causal_conv1d import filter_of
from .common import Requests
from .conv_kernels import ConvStates, TokenRows, decode_kernel


def causal_conv1d_decode(a: Any) -> Tensor:
    x, state = a.x, a.state
    tokens, channels = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
    out = x.new_empty(x.shape)
    block_c = min(triton.next_power_of_2(max(channels, 1)), 1024 if INTERPRETED.value else 128)
    slices = triton.cdiv(channels, block_c)

    def rows(t: Tensor) -> TokenRows:
        return TokenRows(t, t.stride(0), t.stride(1) if t.dim() == 3 else 0)

    launch(
        decode_kernel,
        x.shape[0] * slices if tokens > 0 else 0,
        x,
        rows(x),
        rows(out),
        ConvStates(state, *state.stride()),
        filter_of(a.weight, a.bias),
        Requests(a.state_indices, a.accepted),
        tokens,
        state.shape[0],
        slices,
        channels,
        state.shape[2],
        WIDTH=a.weight.shape[1],
        SILU=a.activation == "silu",
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out
