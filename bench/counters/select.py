"""Cases of topk_select, next to CUB's radix sort and torch's radix select, and of the operators
that score keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import tokenmill as tm

from ..topk_select import scores_of
from .case import Counted, CounterCase, peer_rows, products

COLUMNS = 65536  # columns of the peers


def topk_bounds() -> dict[str, float]:
    """Best of the peers for each figure; warp instructions per 32 keys equal thread instructions
    per key."""
    rows = peer_rows("topk_select")
    return {
        "instructions": min(row["warp_instructions"] for row in rows) / (COLUMNS / 32),
        "traffic_over_least": min(row["sector_kib"] for row in rows) * 1024 / (COLUMNS * 4),
    }


def _topk(kind: str, k: int, columns: int = COLUMNS) -> CounterCase:
    def prepare() -> Callable[[], object]:
        scores = scores_of(kind, 1, columns)
        return lambda: tm.topk_select(scores, k, backend="emulated")

    return CounterCase(
        f"{kind} 1 x {columns}, k={k}",
        columns / 32,
        columns * 4,
        0,
        prepare,
        topk_bounds() if columns == COLUMNS and kind == "normal" else {},
        with_moves=True,
    )


def topk_cases() -> Iterator[CounterCase]:
    for k in (512, 2048):
        yield _topk("normal", k)
    for kind in ("equal", "99.9 % ties"):
        yield _topk(kind, 512)
    yield _topk("normal", 512, 4 * COLUMNS)


H, HK, D = 32, 8, 128


def _scores(
    name: str, scoring: str, tokens: int, dtype: torch.dtype = torch.bfloat16, block: int = 1,
    queries: int = 1, q_reduce: str = "none", block_q: int = 1, head_reduce: str = "none",
    float8: bool = False,
) -> CounterCase:  # fmt: skip
    keys = tokens if scoring == "max_block" else tokens // block
    half = 2 if scoring == "minmax" else 1

    def prepare() -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, queries, H, D, generator=generator).to(dtype)
        k = torch.randn(1, keys, HK, half, D, generator=generator).sort(3)[0].to(dtype)
        k = k if scoring == "minmax" else k[:, :, :, 0].contiguous()
        k = k.to(torch.float8_e4m3fn) if float8 else k
        return lambda: tm.kv_block_scores(
            q, k, scoring=scoring, block_k=block, q_reduce=q_reduce, block_q=block_q,
            head_reduce=head_reduce, backend="emulated",
        )  # fmt: skip

    rows = queries // block_q
    scored = rows if q_reduce == "mean" else queries  # query rows
    size = dtype.itemsize
    read = (keys * half * HK * (1 if float8 else size) + queries * H * size) * D
    heads = {"none": H, "softmax_vote": 1}.get(head_reduce, HK)
    return CounterCase(
        f"{name}, {str(dtype)[6:]}",
        keys * HK,
        read + heads * rows * (tokens // block) * 4,
        products(H * D * half * keys * scored, dtype),
        prepare,
    )


def scores_cases() -> Iterator[CounterCase]:
    yield _scores("8192 tokens", "dot", 8192)
    yield _scores("8192 tokens", "dot", 8192, torch.float32)
    yield _scores("8192 tokens, float8", "dot", 8192, float8=True)
    yield _scores("8192 tokens, vote", "dot", 8192, head_reduce="softmax_vote")
    yield _scores("maxima of 16 of 8192 tokens", "max_block", 8192, block=16)
    yield _scores("maxima of 64 of 8192 tokens", "max_block", 8192, block=64)
    yield _scores("2048 boxes", "minmax", 32768, block=16)
    yield _scores(
        "2048 boxes, maximum of a group", "minmax", 32768, block=16, head_reduce="group_max"
    )
    yield _scores("2048 boxes", "minmax", 32768, torch.float32, 16)
    yield _scores(
        "means of 64 of 2048 queries, 32 keys", "dot", 2048, block=64, queries=2048,
        q_reduce="mean", block_q=64,
    )  # fmt: skip
    yield _scores(
        "maxima of 64 of 512 queries and groups, 32 keys", "dot", 2048, block=64,
        queries=512, q_reduce="max", block_q=64, head_reduce="group_max",
    )  # fmt: skip


def _prefill(with_lse: bool) -> CounterCase:
    """Column scores of 512 keys over as many queries, causal."""
    tokens, heads, dim, dtype = 512, 1, 64, torch.float16

    def prepare() -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, tokens, heads, dim, generator=generator).to(dtype) for _ in range(2))
        lse = tm.attention(q, k, k, causal=True, return_lse=True)[1] if with_lse else None
        return lambda: tm.attention_column_scores(q, k, lse, causal=True, backend="emulated")

    scores = heads * tokens * (tokens + 1) // 2
    passes = 1 if with_lse else 2
    return CounterCase(
        f"S{tokens} D{dim} causal{', lse given' if with_lse else ''}, {str(dtype)[6:]}",
        scores / 1000,
        heads * tokens * (2 * dim * dtype.itemsize + (1 + with_lse) * 4),
        products(passes * scores * dim, dtype),
        prepare,
    )


def columns_cases() -> Iterator[CounterCase]:
    yield _prefill(True)
    yield _prefill(False)


def rows_cases() -> Iterator[CounterCase]:
    keys, dtype = 4096, torch.bfloat16

    def prepare() -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, 1, H, D, generator=generator).to(dtype)
        k = torch.randn(1, keys, HK, D, generator=generator).to(dtype)
        return lambda: tm.attention_row_scores(q, k, backend="emulated")

    minimum = keys * (HK * D * dtype.itemsize + 4) + H * D * dtype.itemsize
    yield CounterCase(f"a step over {keys} keys, {str(dtype)[6:]}", keys * HK, minimum, 0, prepare)


def _indexer(
    name: str,
    queries: int,
    keys: int,
    topk: int,
    heads: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    float8: bool = False,
) -> CounterCase:
    """Indexer on queries that all see all keys."""

    def prepare() -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, queries, heads, D, generator=generator).to(dtype)
        k = torch.randn(1, keys, D, generator=generator).to(dtype)
        weights = torch.randn(1, queries, heads, generator=generator)
        options: dict[str, Any] = {"causal": False, "backend": "emulated"}
        if float8:
            k, options["k_scale"] = k.to(torch.float8_e4m3fn), torch.ones(1, keys)
        return lambda: tm.indexer_topk_select(q, k, weights, topk, **options)

    key = D + 4 if float8 else D * dtype.itemsize
    read = keys * key + queries * heads * (D * dtype.itemsize + 4)
    return CounterCase(
        f"{name}, {str(dtype)[6:]}",
        queries * keys,
        read + queries * (topk + 1) * 4,
        products(queries * keys * heads * D, dtype),
        prepare,
    )


def indexer_cases() -> Iterator[CounterCase]:
    yield _indexer("a step over 131072 keys", 1, 131072, 2048)
    yield _indexer("a step over 16384 keys", 1, 16384, 2048)
    yield _indexer("a step over 4096 keys", 1, 4096, 512, dtype=torch.float32)
    yield _indexer("a step over 16384 keys, 8 heads", 1, 16384, 2048, 8)
    yield _indexer("a step over 131072 float8 keys", 1, 131072, 2048, float8=True)
    yield _indexer("64 queries, 2048 keys", 64, 2048, 256)
    yield _indexer("256 queries, 8192 keys", 256, 8192, 256)


TOPK = Counted(
    "32 keys, moves among the instructions", topk_cases, "CUB's sort and torch's radix select"
)
OF_A_CACHE = f"key of a key head; H={H}, Hk={HK}, D={D}"
SCORES = Counted(OF_A_CACHE, scores_cases)
ROWS = Counted(OF_A_CACHE, rows_cases)
INDEXER = Counted(f"pair of a query and a key; Hi=64, D={D}", indexer_cases)
COLUMNS_OF_WEIGHTS = Counted("1000 scores; one head", columns_cases)
