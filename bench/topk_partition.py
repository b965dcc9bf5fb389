"""Cases of topk_partition: typical inputs of token reduction, next to torch.topk by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Case, Run, place


def cases() -> Iterator[Case]:
    yield _case("DeiT-S", 64, 196, 137, "score")
    yield _case("DeiT-S", 64, 196, 137, "index")
    yield _case("VTC-CLS", 8, 576, 128, "index")
    yield _case("Focus-DETR", 4, 15_000, 7_500, "score")


def _case(name: str, batch: int, tokens: int, k: int, order: str) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        scores = place(torch.randn(batch, tokens, generator=torch.Generator().manual_seed(0)))
        index = place(torch.arange(tokens)).expand(batch, tokens)

        def with_complement() -> tuple[torch.Tensor, torch.Tensor]:
            keep = torch.topk(scores, k)[1]
            rest = torch.ones_like(index, dtype=torch.bool).scatter_(1, keep, False)
            keep = keep if order == "score" else keep.sort()[0]
            return keep, index[rest].view(batch, tokens - k)

        return lambda: tm.topk_partition(scores, k, order=order), {
            "torch.topk": lambda: lambda: torch.topk(scores, k),
            "topk and complement": lambda: with_complement,
        }

    return Case(
        "topk_partition",
        f"{name} {batch} x {tokens} k={k} by {order}",
        torch.float32,
        float(batch * tokens),
        float(batch * tokens * 8),
        prepare,
    )
