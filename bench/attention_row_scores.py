"""Cases of attention_row_scores: the class token of a vision transformer, a decode step over a
cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Case, Run, place


def cases() -> Iterator[Case]:
    yield _case("DeiT-S class token", 32, 197, 6, 6, 64, 1, torch.float32)
    yield _case("CLIP-L class token", 1, 577, 16, 16, 64, 1, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("a step over 32768", 1, 32768, 32, 8, 128, 0, dtype)


def _case(
    name: str, batch: int, keys: int, heads: int, kv_heads: int, dim: int, skip: int,
    dtype: torch.dtype,
) -> Case:  # fmt: skip
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q = place(torch.randn(batch, 1, heads, dim, generator=generator).to(dtype))
        k = place(torch.randn(batch, keys, kv_heads, dim, generator=generator).to(dtype))

        def eager() -> Run:
            row = q.view(batch, kv_heads, heads // kv_heads, dim) * dim**-0.5
            columns = k.permute(0, 2, 3, 1).contiguous()
            return lambda: (row @ columns).softmax(-1).mean((1, 2))[:, skip:]

        return lambda: tm.attention_row_scores(q, k, skip=skip), {"eager softmax, mean": eager}

    return Case(
        "attention_row_scores",
        name,
        dtype,
        2.0 * batch * heads * keys * dim,
        float(batch * keys * (kv_heads * dim * dtype.itemsize + 4)),
        prepare,
    )
