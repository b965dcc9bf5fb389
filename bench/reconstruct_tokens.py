"""Cases of reconstruct_tokens, compute-bound. Eager code has the matrix of all distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place

TAU = 0.005


def eager_reconstruct(f: Tensor, s: Tensor, z: Tensor, k: int) -> Tensor:
    d = f.square().sum(2, keepdim=True) + s.square().sum(2)[:, None] - 2 * f @ s.mT
    minimum, index = d.topk(k, 2, largest=False)
    w = torch.softmax(-TAU * minimum, 2)
    rows = z.gather(1, index.flatten(1)[..., None].expand(-1, -1, z.shape[2]))
    return (w[..., None] * rows.view(*index.shape, -1)).sum(2)


def _case(tokens: int, count: int, channels: int, k: int, dtype: torch.dtype) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        g = torch.Generator().manual_seed(0)
        f, s, z = (
            place(torch.randn(1, n, channels, generator=g).to(dtype))
            for n in (tokens, count, count)
        )
        return lambda: tm.reconstruct_tokens(f, s, z, k=k, tau=TAU), {
            "eager": lambda: lambda: eager_reconstruct(f, s, z, k),
        }

    return Case(
        "reconstruct_tokens",
        f"{tokens} of {count}, C={channels}, k={k}",
        dtype,
        3.0 * tokens * count * channels + 2.0 * tokens * k * channels,
        float((2 * tokens + 2 * count) * channels * dtype.itemsize),
        prepare,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(4096, 1024, 384, 3, dtype)
        yield _case(4096, 1024, 192, 20, dtype)
