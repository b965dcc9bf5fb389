"""Cases of delta_attention: products of a chunk on tensor cores, three tf32 products each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Counted, CounterCase

LENGTH, HEADS, DIM, CHUNK = 256, 4, 128, 32


def _case(dtype: torch.dtype, per_channel: bool = False, backward: bool = False) -> CounterCase:
    def prepare() -> Callable[[], object]:
        g = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, LENGTH, HEADS, DIM, generator=g).to(dtype).requires_grad_(backward)
            for _ in range(3)
        )
        beta = torch.rand(1, LENGTH, HEADS, generator=g).requires_grad_(backward)
        shape = (1, LENGTH, HEADS, DIM) if per_channel else (1, LENGTH, HEADS)
        gate = torch.nn.functional.logsigmoid(torch.randn(shape, generator=g) + 3)
        gate.requires_grad_(backward)

        def forward() -> Tensor:
            return tm.delta_attention(
                q, k, v, beta, log_decay=gate, qk_l2norm=True, backend="emulated"
            )

        if not backward:
            return forward
        out = forward()
        cotangent = torch.randn(out.shape, generator=g).to(dtype)
        leaves = (q, k, v, beta, gate)
        return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)

    # Every tensor once: rows of q, k, v and out, seven with gradients; gates, twice with gradients.
    gates = (1 + (DIM if per_channel else 1)) * (1 + backward) * 4
    token = (7 if backward else 4) * DIM * dtype.itemsize + gates
    # Multiply-adds of a token: the pairs of its chunk, and three products with the state.
    products = (3 * DIM * DIM + 2 * CHUNK * DIM) * (3 if backward else 1)
    name = f"{'backward' if backward else 'forward'} D{DIM} S{LENGTH} H{HEADS}"
    name += f", a decay per {'channel' if per_channel else 'head'}, {str(dtype)[6:]}"
    tokens = LENGTH * HEADS
    return CounterCase(name, tokens, tokens * token, 2 * products * tokens / 4096, prepare)


def cases() -> Iterator[CounterCase]:
    for per_channel in (False, True):
        yield _case(torch.bfloat16, per_channel)
        yield _case(torch.bfloat16, per_channel, backward=True)
    yield _case(torch.float32)


COUNTED = Counted("token and head", cases)
