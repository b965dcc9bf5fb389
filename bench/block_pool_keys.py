"""Cases of block_pool_keys, bound by key bandwidth: summing the keys is the peer to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Case, Run, place

HEADS, HEAD_DIM, TOKENS = 8, 128, 65536


def _case(mode: str, block: int, dtype: torch.dtype) -> Case:
    elements = TOKENS * HEADS * HEAD_DIM

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        k = place(torch.randn(1, TOKENS, HEADS, HEAD_DIM, generator=generator).to(dtype))
        blocks = k.unflatten(1, (-1, block))
        eager = {
            "mean": lambda: blocks.mean(2),
            "max": lambda: blocks.amax(2),
            "minmax": lambda: torch.stack(torch.aminmax(blocks, dim=2), 3),
        }[mode]
        return lambda: tm.block_pool_keys(k, block, mode=mode), {
            "eager": lambda: eager,
            "sum of the keys": lambda: k.sum,
        }

    halves = 2 if mode == "minmax" else 1
    moved = (elements + halves * elements // block) * dtype.itemsize
    return Case(
        "block_pool_keys", f"{mode} of {block}", dtype, float(halves * elements), float(moved),
        prepare,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        yield _case("mean", 64, dtype)
        yield _case("minmax", 16, dtype)
    yield _case("max", 16, torch.bfloat16)
