"""Cases of titans_memory, whose products are float32 on ordinary units, without tensor cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Counted, CounterCase

LENGTH, HEADS, DIM = 128, 17, 64  # more slices of 8 columns than SMs
GATES = ((0.0, 0.02), (0.3, 0.8), (0.0, 0.03))  # alpha, eta, theta


def _case(dtype: torch.dtype, chunk: int = 64, backward: bool = False) -> CounterCase:
    def prepare() -> Callable[[], object]:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, LENGTH, HEADS, DIM, generator=g) for _ in range(3))
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
        q, k, v = (t.to(dtype).requires_grad_(backward) for t in (q, k, v))
        drawn = (torch.rand(1, LENGTH, HEADS, generator=g) for _ in GATES)
        alpha, eta, theta = (
            (x * (maximum - minimum) + minimum).requires_grad_(backward)
            for x, (minimum, maximum) in zip(drawn, GATES, strict=True)
        )

        def forward() -> Tensor:
            return tm.titans_memory(
                q, k, v, alpha=alpha, eta=eta, theta=theta, chunk_size=chunk, backend="emulated"
            )

        if not backward:
            return forward
        out = forward()
        cotangent = torch.randn(out.shape, generator=g).to(dtype)
        leaves = (q, k, v, alpha, eta, theta)
        return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)

    # Every tensor once: rows of q, k, v and out, seven with gradients; gates, twice with gradients.
    token = (7 if backward else 4) * DIM * dtype.itemsize + (1 + backward) * len(GATES) * 4
    name = f"{'backward' if backward else 'forward'} D{DIM} S{LENGTH} H{HEADS}, chunks of {chunk}"
    tokens = LENGTH * HEADS
    return CounterCase(f"{name}, {str(dtype)[6:]}", tokens, tokens * token, 0, prepare)


def cases() -> Iterator[CounterCase]:
    yield _case(torch.float16)
    yield _case(torch.float16, backward=True)
    yield _case(torch.float32)
    yield _case(torch.float16, chunk=16)


COUNTED = Counted("token and head", cases)
