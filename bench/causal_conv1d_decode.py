"""Cases of causal_conv1d_decode: the fallback of transformers, and a copy of the states."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

import tokenmill as tm

from .case import Absent, Case, Run, place


def eager_decode(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, C], state [B, C, W], shifted in place."""
    state.copy_(state.roll(-1, -1))
    state[..., -1] = x
    return silu((state * weight).sum(-1) + bias)


def _case(batch: int, channels: int = 8192, dtype: torch.dtype = torch.bfloat16) -> Case:
    width = 4

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return place(torch.randn(shape, generator=generator).to(dtype))

        x, weight, bias = draw(batch, channels), draw(channels, width), draw(channels)
        states = [draw(batch, channels, width) for _ in range(3)]
        other = torch.empty_like(states[0])

        def fallback() -> Run:
            if not importlib.util.find_spec("transformers"):
                raise Absent("transformers is not installed")
            from transformers.models.qwen3_next import modeling_qwen3_next as model

            if not hasattr(model, "causal_conv1d_update"):
                raise Absent("this version has another fallback")
            update, token = model.causal_conv1d_update, x[..., None]
            return lambda: update(token, states[1], weight, bias, "silu")

        peers: dict[str, Callable[[], Run]] = {
            "transformers": fallback,
            "eager": lambda: lambda: eager_decode(x, states[2], weight, bias),
            "copy of the state": lambda: lambda: other.copy_(states[0]),
        }
        own = states[0].clone()
        return lambda: tm.causal_conv1d_decode(x, own, weight, bias, activation="silu"), peers

    elements = batch * channels
    return Case(
        "causal_conv1d_decode",
        f"B={batch} C={channels} W={width}",
        dtype,
        (2.0 * width + 8) * elements,
        float(elements * dtype.itemsize) * (2 + 2 * width),
        prepare,
    )


def cases() -> Iterator[Case]:
    for batch in (1, 8, 64):
        yield _case(batch)
    yield _case(8, dtype=torch.float32)
