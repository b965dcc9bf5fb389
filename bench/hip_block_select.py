"""Cases of hip_block_select: lists of a prefill and of decoding next to exact lists from all
products, and hip_attention next to dense attention. Peers of longer prefills take a minute per call
and are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokenmill as tm

from .attention import sdpa
from .case import Absent, Case, Run, place

BUDGET, BLOCK_Q, BLOCK_K, STRIDE_Q, SINK, RECENT = 512, 64, 2, 2, 16, 256
DECODED = 8  # tokens per search
LONGEST_PEER = 32768


@dataclass(frozen=True)
class Shape:
    tokens: int
    queries: int
    heads: int = 8
    kv_heads: int = 8
    dim: int = 64

    @property
    def last_queries(self) -> range:
        """Last query of each query block."""
        return range(min(BLOCK_Q, self.queries) - 1, self.queries, BLOCK_Q)

    def draw(self, dtype: torch.dtype) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        rows = ((self.queries, self.heads), *[(self.tokens, self.kv_heads)] * 2)
        return [place(torch.randn(1, *row, self.dim, generator=g).to(dtype)) for row in rows]


def keys_scored(shape: Shape) -> float:
    """Number of representative keys multiplied, over all query blocks of a head. The last of
    several steps knows the second block of each pair, which represented it, and the first one if it
    began the second half of a scored node: without preferences, all but 1 of 2^(steps - 2) did."""
    total = 0.0
    for last in shape.last_queries:
        seen = max(shape.tokens - shape.queries + last + 1 - RECENT - SINK, 0)
        steps = math.ceil(math.log2(max(seen / BUDGET, 1)))
        if steps == 1:
            total += seen
        elif steps > 1:
            total += (2 * (steps - 1) + 2.0 ** (2 - steps)) * BUDGET
    return total


def _pairs(shape: Shape) -> float:
    """Attended pairs of query and key, per head."""
    maximum = BUDGET + SINK + RECENT
    return float(sum(min(shape.tokens - i, maximum) for i in range(shape.queries)))


def _work(shape: Shape) -> float:
    """Operations of the search."""
    speakers = min(BLOCK_Q, shape.queries) // STRIDE_Q or 1
    return 2.0 * shape.dim * shape.heads * keys_scored(shape) * speakers


def _list_heads(shape: Shape, options: dict[str, Any]) -> int:
    return shape.kv_heads if options.get("head_reduce") == "group_max" else shape.heads


def _lists(name: str, shape: Shape, dtype: torch.dtype, **options: Any) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        q, k, _ = shape.draw(dtype)

        def peer() -> Run:
            _check_length(shape.queries)
            return lambda: tm.hip_block_select(q, k, bound="minmax", **options)

        return lambda: tm.hip_block_select(q, k, **options), {"every product": peer}

    lists = _list_heads(shape, options)
    keys = min(shape.tokens * shape.kv_heads, lists * keys_scored(shape))
    entries = lists * len(shape.last_queries) * BUDGET // BLOCK_K
    moved = (shape.queries * shape.heads + keys) * shape.dim * dtype.itemsize + entries * 4
    return Case("hip_block_select", name, dtype, _work(shape), moved, prepare, length=shape.queries)


def _check_length(queries: int) -> None:
    if queries > LONGEST_PEER:
        raise Absent("a minute a call")


def _prefill(tokens: int, dtype: torch.dtype) -> Case:
    shape = Shape(tokens, tokens)

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        q, k, v = shape.draw(dtype)

        def peer() -> Run:
            _check_length(tokens)
            own = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
            return lambda: sdpa(own[0], own[1], own[2], True)

        return lambda: tm.hip_attention(q, k, v), {"SDPA, causal": peer}

    work = _work(shape) + 4.0 * shape.dim * shape.heads * _pairs(shape)
    moved = 4.0 * tokens * shape.heads * shape.dim * dtype.itemsize
    name = f"S={tokens} attention"
    return Case("hip_block_select", name, dtype, work, moved, prepare, length=tokens)


def _decode(name: str, shape: Shape, dtype: torch.dtype, steps: int, **options: Any) -> Case:
    """`steps` tokens with one search for all."""

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        q, k, v = shape.draw(dtype)
        seqlens_k = place(torch.tensor([shape.tokens], dtype=torch.int32))

        def ours() -> None:
            lists = tm.sparse.HipLists()
            for _ in range(steps):
                tm.hip_attention(q, k, v, lists=lists, refresh_interval=steps, **options)

        def dense() -> None:
            for _ in range(steps):
                tm.attention_decode(q, k, v, seqlens_k=seqlens_k)

        return ours, {"attention_decode": lambda: dense}

    work = _work(shape) + steps * 4.0 * shape.dim * shape.heads * _pairs(shape)
    rows = keys_scored(shape) + steps * 2 * _pairs(shape)  # rows of keys and values
    moved = _list_heads(shape, options) * rows * shape.dim * dtype.itemsize
    return Case("hip_block_select", name, dtype, work, moved, prepare)


def cases() -> Iterator[Case]:
    one = Shape(131072, 1, 32, 8, 128)
    group: dict[str, Any] = {"head_reduce": "group_max"}
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (8192, 16384, 32768, 65536, 131072):
            yield _lists(f"S={tokens} lists", Shape(tokens, tokens), dtype)
        for tokens in (8192, 16384, 32768, 65536, 131072):
            yield _prefill(tokens, dtype)
        yield _lists("decode at 131072, lists", one, dtype)
        yield _lists("decode at 131072, lists of groups", one, dtype, **group)
        yield _decode("decode at 131072, attention", one, dtype, 1)
        yield _decode("decode at 131072, attention of groups", one, dtype, 1, **group)
        yield _decode(f"decode at 131072, {DECODED} tokens", one, dtype, DECODED)
        yield _decode(f"decode at 131072, {DECODED} tokens of groups", one, dtype, DECODED, **group)
