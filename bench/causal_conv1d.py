"""Cases of causal_conv1d, bound by memory: torch's conv1d, the fallback of transformers, and the
copy of x."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

import tokenmill as tm

from .case import Absent, Case, Run, place


def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """On channels-first memory, which suits conv1d; out stays channels-first."""
    width = weight.shape[1]
    out = conv1d(x, weight[:, None], bias, padding=width - 1, groups=weight.shape[0])
    return silu(out[..., : x.shape[-1]])


def transformers_fallback() -> Callable[..., Tensor]:
    if not importlib.util.find_spec("transformers"):
        raise Absent("transformers is not installed")
    from transformers.models.qwen3_next import modeling_qwen3_next as model

    if not hasattr(model, "causal_conv1d_fn"):
        raise Absent("this version has another fallback")
    return lambda x, weight, bias: model.causal_conv1d_fn(x, weight, bias, activation="silu")


def _case(
    length: int, channels: int, *, batch: int = 1, width: int = 4,
    dtype: torch.dtype = torch.float32, backward: bool = False,
) -> Case:  # fmt: skip
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return place(torch.randn(shape, generator=generator).to(dtype))

        x, weight, bias = draw(batch, length, channels), draw(channels, width), draw(channels)
        first = x.transpose(1, 2).contiguous()

        def own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return tm.causal_conv1d(x, weight, bias, activation="silu")

        def call(function: Callable[..., Tensor], x: Tensor) -> Run:
            if not backward:
                return lambda: function(x, weight, bias)
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            cotangent = torch.randn_like(x)
            return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)

        peers: dict[str, Callable[[], Run]] = {
            "torch conv1d": lambda: call(torch_conv1d, first),
            "transformers": lambda: call(transformers_fallback(), x.transpose(1, 2)),
        }
        if not backward:
            other = torch.empty_like(x)
            peers["copy of x"] = lambda: lambda: other.copy_(x)
        return call(own, x), peers

    elements = batch * length * channels
    return Case(
        "causal_conv1d",
        f"B={batch} T={length} C={channels} W={width}",
        dtype,
        (2.0 * width + 8) * elements * (3.0 if backward else 1.0),
        float(elements * dtype.itemsize) * (5 if backward else 2),
        prepare,
        "forward+backward" if backward else "forward",
        length=length,
    )


def cases() -> Iterator[Case]:
    """8192 channels are those of Qwen3-Next-80B-A3B, 2304 of them a small Mamba."""
    for dtype in (torch.bfloat16, torch.float32):
        yield _case(2048, 8192, dtype=dtype)
        yield _case(2048, 8192, dtype=dtype, backward=True)
    yield _case(4096, 2304, width=3)
    yield _case(128, 8192)
    yield _case(512, 2304, batch=8)
