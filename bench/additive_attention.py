"""Cases of additive_attention. Eager code materializes the tensor [B, T, N, A] of all tanh
values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place

TANGENT = 4.0  # operations: sum of query and key, tanh, product with v, row sum
BACKWARD = 11.0  # operations of a backward


def eager_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(q[:, :, None] + k[:, None]) @ v


def _case(rows: int, keys: int, width: int, dtype: torch.dtype, backward: bool = False) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        g = torch.Generator().manual_seed(0)
        shapes = (1, rows, width), (1, keys, width), (width,)
        given = [
            place(torch.randn(shape, generator=g).to(dtype)).requires_grad_(backward)
            for shape in shapes
        ]
        cotangent = place(torch.randn(1, rows, keys, generator=g).to(dtype))

        def step(function: Callable[..., Tensor]) -> Run:
            if not backward:
                return lambda: function(*given)
            return lambda: torch.autograd.grad(function(*given), given, cotangent)

        return step(tm.additive_attention), {"eager": lambda: step(eager_scores)}

    tangents = float(rows * keys * width)
    size = dtype.itemsize
    moved = size * float((rows + keys) * width + rows * keys)
    return Case(
        "additive_attention",
        f"{rows} x {keys}, A={width}",
        dtype,
        tangents * (TANGENT + BACKWARD if backward else TANGENT),
        moved * (3 if backward else 1),
        prepare,
        "forward+backward" if backward else "forward",
    )


def cases() -> Iterator[Case]:
    for backward in (False, True):
        yield _case(1024, 1024, 128, torch.float32, backward)
        yield _case(1024, 1024, 128, torch.bfloat16, backward)
    yield _case(64, 512, 256, torch.float32, True)
    yield _case(1, 4096, 256, torch.float32)
