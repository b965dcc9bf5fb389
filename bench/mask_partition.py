"""Cases of mask_partition: tokens that DToP keeps, next to PyTorch code that packs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Case, Run, place


def cases() -> Iterator[Case]:
    for batch, tokens in ((8, 1024), (64, 4096)):
        for share in (0.5, 0.99):
            yield _case(batch, tokens, share)


def _case(batch: int, tokens: int, share: float) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        mask = place(torch.rand(batch, tokens, generator=generator) < share)

        def eager() -> tuple[torch.Tensor, ...]:
            flat = mask.flatten()
            place_of = flat.cumsum(0, dtype=torch.int32) - 1
            ends = mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            return flat.nonzero(), ends, torch.where(flat, place_of, -1)

        return lambda: tm.mask_partition(mask), {
            "nonzero and cumsum": lambda: eager,
            "nonzero": lambda: mask.nonzero,
        }

    return Case(
        "mask_partition",
        f"{batch} x {tokens}, {share:.0%} taken",
        torch.int32,
        float(batch * tokens),
        float(batch * tokens * (5 + 4 * share)),
        prepare,
    )
