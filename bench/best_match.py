"""Cases of best_match: the matching step of ToMe, bound by products. Eager code writes all of them
to memory before it takes the maximum of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place


def eager_match(metric: Tensor) -> tuple[Tensor, Tensor]:
    unit = metric / metric.norm(dim=-1, keepdim=True)
    score, index = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    return index, score


def _case(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> Case:
    rows, partners = (tokens + 1) // 2, tokens // 2

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        metric = place(torch.randn(batch, tokens, channels, generator=generator).to(dtype))
        a, b = metric[:, ::2], metric[:, 1::2]
        own = a.contiguous(), b.mT.contiguous()
        return lambda: tm.best_match(a, b, normalize=True), {
            "eager": lambda: lambda: eager_match(metric),
            "product of matrices": lambda: lambda: own[0] @ own[1],
        }

    return Case(
        "best_match",
        f"{batch} x {tokens} tokens, C={channels}",
        dtype,
        2.0 * batch * rows * partners * channels,
        float(batch * (tokens * channels * dtype.itemsize + 8 * rows)),
        prepare,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(64, 197, 64, dtype)  # ViT at 224 pixels
        yield _case(8, 577, 64, dtype)  # at 384
        yield _case(8, 4096, 64, dtype)
        yield _case(8, 4096, 320, dtype)  # Stable Diffusion at 512, hidden state
    yield _case(8, 4096, 320, torch.float16)
