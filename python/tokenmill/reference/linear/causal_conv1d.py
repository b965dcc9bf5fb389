"""causal_conv1d, tap by tap.

    out_t = act(bias + sum_j weight_j x_(t - W + 1 + j))

Inputs before the sequence are those of initial_state, or 0. The final state is the last W - 1
inputs, some of which may be those of initial_state. PyTorch's autograd differentiates.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """inputs [..., C, W - 1 + T]: outputs [..., C, T]."""
    width = weight.shape[1]
    length = inputs.shape[-1] - (width - 1)
    out = torch.zeros_like(inputs[..., :length])
    if bias is not None:
        out = out + bias[:, None]
    for j in range(width):
        out = out + weight[:, j, None] * inputs[..., j : j + length]
    return functional.silu(out) if activation == "silu" else out


def causal_conv1d(a: Any) -> tuple[Tensor, Tensor]:
    """x [B, T, C] (packed [T, C]), weight [C, W], bias [C], initial_state [B, C, W - 1] or None."""
    return _in_dtype(a, torch.promote_types(a.x.dtype, torch.float32))


def causal_conv1d_plain(a: Any) -> tuple[Tensor, Tensor]:
    """In the dtype of x throughout, as plain PyTorch code would: the baseline of the error
    budget.
    """
    return _in_dtype(a, a.x.dtype)


def _in_dtype(a: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    back = a.weight.shape[1] - 1
    weight = a.weight.to(dtype)
    bias = None if a.bias is None else a.bias.to(dtype)
    sequences = [a.x]
    if a.cu_seqlens is not None:
        ends = a.cu_seqlens.tolist()
        sequences = [a.x[None, b:e] for b, e in itertools.pairwise(ends)]
    outs, states = [], []
    for n, x in enumerate(sequences):
        each = slice(None) if a.cu_seqlens is None else slice(n, n + 1)
        if a.initial_state is None:
            before = x.new_zeros(x.shape[0], x.shape[-1], back)
        else:
            before = a.initial_state[each]
        inputs = torch.cat([before, x.transpose(1, 2)], -1)
        states.append(inputs[..., inputs.shape[-1] - back :])
        outs.append(convolve(inputs.to(dtype), weight, bias, a.activation).transpose(1, 2))
    if not sequences:
        outs, states = [a.x.new_zeros(1, *a.x.shape)], [a.x.new_zeros(0, a.x.shape[-1], back)]
    out = outs[0] if a.cu_seqlens is None else torch.cat(outs, 1)[0]
    state = torch.cat(states) if a.return_final_state else a.x.new_empty(0)
    return out.to(a.x.dtype).contiguous(), state
