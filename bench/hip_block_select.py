"""Cases of hip_block_select: the lists of a prefill and of decoding, beside every product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Case, Run, place

BUDGET, BLOCK_Q, STRIDE_Q, SINK, RECENT = 512, 64, 2, 16, 256


def _keys_scored(queries: int, tokens: int, exact: bool) -> float:
    """Of all query blocks of a head, keys of representatives that are multiplied."""
    total = 0.0
    for last in range(min(BLOCK_Q, queries) - 1, queries, BLOCK_Q):
        seen = max(tokens - queries + last + 1 - RECENT - SINK, 0)
        steps = math.ceil(math.log2(max(seen / BUDGET, 1)))
        total += seen if exact else max(2 * steps - 1, 0) * BUDGET  # the last step knows half
    return total


def _case(
    title: str, tokens: int, dtype: torch.dtype, queries: int = 1, heads: int = 8,
    kv_heads: int = 8, dim: int = 64, exact: bool = False,
) -> Case:  # fmt: skip
    bound = "minmax" if exact else "sample"

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        q = place(torch.randn(1, queries, heads, dim, generator=generator).to(dtype))
        k = place(torch.randn(1, tokens, kv_heads, dim, generator=generator).to(dtype))

        def run() -> object:
            return tm.hip_block_select(q, k, bound=bound)  # type: ignore[arg-type]

        def attend() -> object:
            x, y = q.transpose(1, 2), k.transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(
                x, y, y, is_causal=queries > 1, enable_gqa=True
            )

        return run, {"scaled_dot_product_attention": lambda: attend}

    speakers = min(BLOCK_Q, queries) // STRIDE_Q or 1
    keys = _keys_scored(queries, tokens, exact) * heads
    read = (queries * heads + tokens * kv_heads) * dim * dtype.itemsize
    lists = heads * math.ceil(queries / BLOCK_Q)
    work, moved = 2.0 * dim * keys * speakers, float(read + lists * BUDGET // 2 * 4)
    return Case("hip_block_select", title, dtype, work, moved, prepare, length=queries)


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (8192, 16384, 32768):
            yield _case(f"prefill {tokens}", tokens, dtype, tokens)
        yield _case("decode, 131072", 131072, dtype, 1, 32, 8, 128)
    yield _case("exact, 8192", 8192, torch.float32, 8192, exact=True)
