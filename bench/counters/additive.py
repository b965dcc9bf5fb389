"""Cases of additive_attention. tanh binds it, on ordinary and special-function units; it uses no
tensor cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Counted, CounterCase


def _case(rows: int, keys: int, width: int, dtype: torch.dtype, backward: bool) -> CounterCase:
    def prepare() -> Callable[[], object]:
        g = torch.Generator().manual_seed(0)
        shapes = (1, rows, width), (1, keys, width), (width,)
        given = [
            torch.randn(shape, generator=g).to(dtype).requires_grad_(backward) for shape in shapes
        ]

        def forward() -> Tensor:
            return tm.additive_attention(*given, backend="emulated")

        if not backward:
            return forward
        scores = forward()
        cotangent = torch.randn(scores.shape, generator=g).to(dtype)
        return lambda: torch.autograd.grad(scores, given, cotangent, retain_graph=True)

    # Scores and their gradient are float32.
    inputs, scores = ((rows + keys + 1) * width * dtype.itemsize, rows * keys * 4)
    name = f"{'backward' if backward else 'forward'} {rows} x {keys}, A={width}, {str(dtype)[6:]}"
    tangents = rows * keys * width
    return CounterCase(name, tangents / 1000, (1 + backward) * inputs + scores, 0, prepare)


def cases() -> Iterator[CounterCase]:
    for backward in (False, True):  # one 64 x 64 forward tile per SM
        yield _case(768, 704, 32, torch.float16, backward)
    for backward in (False, True):  # tiles of 4 x 64
        yield _case(96, 128, 128, torch.float16, backward)
    yield _case(96, 128, 128, torch.float32, False)
    yield _case(1, 4096, 128, torch.float16, False)


COUNTED = Counted("1000 tangents", cases)
