"""Cases of the causal convolution: bytes moved beyond one pass over its tokens, or its states."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Counted, CounterCase

CHANNELS, WIDTH, DTYPE = 1024, 4, torch.bfloat16
SIZE = DTYPE.itemsize
TAPS = CHANNELS * WIDTH * 4


def _draw(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _taps() -> Tensor:
    return _draw(CHANNELS, WIDTH, dtype=torch.float32)


def prompt() -> Iterator[CounterCase]:
    tokens = 1024
    row = tokens * CHANNELS * SIZE

    def forward() -> Callable[[], object]:
        x, weight = _draw(1, tokens, CHANNELS), _taps()
        return lambda: tm.causal_conv1d(x, weight, activation="silu", backend="emulated")

    def backward() -> Callable[[], object]:
        x, weight = _draw(1, tokens, CHANNELS).requires_grad_(), _taps().requires_grad_()
        out = tm.causal_conv1d(x, weight, activation="silu", backend="emulated")
        dout = _draw(1, tokens, CHANNELS)
        return lambda: torch.autograd.grad(out, (x, weight), dout, retain_graph=True)

    for title, least, prepare in (
        ("forward", 2 * row + TAPS, forward),
        ("backward", 3 * row + 2 * TAPS, backward),
    ):
        yield CounterCase(f"{title} {tokens} tokens", least / 1024, least, 0, prepare)


def step() -> Iterator[CounterCase]:
    batch = 64

    def prepare() -> Callable[[], object]:
        x, state = _draw(batch, CHANNELS), _draw(batch, CHANNELS, WIDTH)
        weight = _taps()
        return lambda: tm.causal_conv1d_decode(
            x, state, weight, activation="silu", backend="emulated"
        )

    least = batch * CHANNELS * (2 * WIDTH + 2) * SIZE + TAPS
    yield CounterCase(f"a token of {batch} sequences", least / 1024, least, 0, prepare)


PER = f"KiB that must move; {CHANNELS} channels, width {WIDTH}, {str(DTYPE)[6:]}"
COUNTED = {
    "causal_conv1d": Counted(PER, prompt),
    "causal_conv1d_decode": Counted(PER, step),
}
