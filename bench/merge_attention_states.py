"""Cases of merge_attention_states: a memory-bound operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place


def eager_merge(outs: Tensor, lses: Tensor) -> Tensor:
    weights = torch.softmax(lses, 0).transpose(-1, -2).unsqueeze(-1)
    return (outs * weights).sum(0)


def cases() -> Iterator[Case]:
    parts, batch, length, heads, dim = 4, 1, 4096, 8, 64
    elements = parts * batch * length * heads * dim

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        outs = place(torch.randn(parts, batch, length, heads, dim, generator=generator))
        lses = place(torch.randn(parts, batch, heads, length, generator=generator))
        return lambda: tm.merge_attention_states(outs, lses), {
            "eager": lambda: lambda: eager_merge(outs, lses),
            "clone of the inputs": lambda: outs.clone,
        }

    yield Case(
        "merge_attention_states",
        f"{parts} parts S={length}",
        torch.float32,
        2.0 * elements,
        4.0 * (elements + elements / parts),
        prepare,
    )
