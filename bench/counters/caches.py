"""Cases of operators on caches, states and partial results: bytes moved beyond the minimum."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Counted, CounterCase

HEADS, DIM, DTYPE = 8, 128, torch.bfloat16
ROW = DIM * DTYPE.itemsize


def _draw(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _case(title: str, min_bytes: float, prepare: Callable[[], Callable[[], object]]) -> CounterCase:
    return CounterCase(title, min_bytes / 1024, min_bytes, 0, prepare)


def merge() -> Iterator[CounterCase]:
    parts, tokens = 4, 256
    rows = tokens * HEADS

    def prepare() -> Callable[[], object]:
        outs = _draw(parts, 1, tokens, HEADS, DIM)
        lses = _draw(parts, 1, HEADS, tokens, dtype=torch.float32)
        return lambda: tm.merge_attention_states(outs, lses, backend="emulated")

    yield _case(f"{parts} parts of {tokens} tokens", (parts + 1) * rows * (ROW + 4), prepare)


def state() -> Iterator[CounterCase]:
    batch = 4

    def prepare() -> Callable[[], object]:
        q, k, v = (_draw(batch, 1, HEADS, DIM) for _ in range(3))
        memory = _draw(batch, HEADS, DIM, DIM, dtype=torch.float32)
        decay = -tm.lightning_slopes(HEADS)
        return lambda: tm.linear_attention_decode(
            q, k, v, memory, log_decay=decay, backend="emulated"
        )

    heads = batch * HEADS
    yield _case(f"a token of {batch} sequences", heads * (2 * DIM * DIM * 4 + 4 * ROW), prepare)


def delta_state() -> Iterator[CounterCase]:
    batch = 4

    def prepare() -> Callable[[], object]:
        q, k, v = (_draw(batch, 1, HEADS, DIM) for _ in range(3))
        memory = _draw(batch, HEADS, DIM, DIM, dtype=torch.float32)
        beta, decay = (_draw(batch, 1, HEADS, dtype=torch.float32) for _ in range(2))
        return lambda: tm.delta_attention_decode(
            q, k, v, beta.sigmoid(), memory, log_decay=-decay.exp(), qk_l2norm=True,
            backend="emulated",
        )  # fmt: skip

    heads = batch * HEADS
    yield _case(f"a token of {batch} sequences", heads * (2 * DIM * DIM * 4 + 4 * ROW), prepare)


def pool() -> Iterator[CounterCase]:
    tokens, block = 2048, 16

    def prepare(mode: str) -> Callable[[], object]:
        k = _draw(1, tokens, HEADS, DIM)
        return lambda: tm.block_pool_keys(k, block, mode=mode, backend="emulated")

    for mode, rows in (("mean", 1), ("minmax", 2)):
        minimum = HEADS * ROW * (tokens + rows * tokens // block)
        yield _case(
            f"{mode} of {block} of {tokens} tokens", minimum, functools.partial(prepare, mode)
        )


def pool_update() -> Iterator[CounterCase]:
    tokens, block, new, batch = 2048, 16, 1, 8

    def prepare() -> Callable[[], object]:
        k = _draw(batch, tokens, HEADS, DIM)
        pooled = tm.block_pool_keys(k, block)
        lengths = torch.full((batch,), tokens, dtype=torch.int32)
        return lambda: tm.block_pool_keys_update(
            k, pooled, block=block, start=lengths - new, lengths=lengths, backend="emulated"
        )

    yield _case(f"a token of {batch} requests", batch * HEADS * ROW * (block + 1), prepare)


def compact() -> Iterator[CounterCase]:
    tokens, kept = 2048, 1024

    def prepare() -> Callable[[], object]:
        generator = torch.Generator().manual_seed(1)
        k, v = _draw(1, tokens, HEADS, DIM), _draw(1, tokens, HEADS, DIM)
        keep = torch.randperm(tokens, generator=generator)[:kept].sort().values.int()[None]
        counts = torch.tensor([kept], dtype=torch.int32)
        return lambda: tm.kv_cache_compact(k, v, keep, counts, backend="emulated")

    yield _case(f"{kept} of {tokens} tokens", kept * (4 * HEADS * ROW + 4), prepare)


def append() -> Iterator[CounterCase]:
    tokens, pages, size = 256, 32, 16
    float8 = torch.float8_e4m3fn

    def prepare(dtype: torch.dtype, scale: str) -> Callable[[], object]:
        k, v = _draw(tokens, HEADS, DIM), _draw(tokens, HEADS, DIM)
        k_cache, v_cache = torch.zeros(2, pages, size, HEADS, DIM).to(dtype)
        slots = torch.randperm(pages * size, generator=torch.Generator().manual_seed(1))[:tokens]
        angle = _draw(tokens, DIM // 2, dtype=torch.float32)
        shape = (HEADS,) if scale == "heads" else (pages, size, HEADS)
        k_scale, v_scale = (torch.ones(shape) if scale else None for _ in range(2))
        rope = (angle.cos(), angle.sin(), torch.arange(tokens))
        return lambda: tm.kv_cache_append(
            k_cache, v_cache, k, v, slots, rope=rope, k_scale=k_scale, v_scale=v_scale,
            backend="emulated",
        )  # fmt: skip

    rows = 2 * tokens * HEADS
    for dtype, scale in ((DTYPE, ""), (float8, "heads"), (float8, "tokens")):
        minimum = rows * (ROW + DIM * dtype.itemsize) + tokens * (DIM * 4 + 16)
        minimum += rows * 4 if scale == "tokens" else 0
        title = f"{tokens} tokens into {str(dtype)[6:]}" + (f", scales of {scale}" if scale else "")
        yield _case(title, minimum, functools.partial(prepare, dtype, scale))
    yield from latent_append()


def latent_append() -> Iterator[CounterCase]:
    """Latent rows of one head, with rotary embedding on the last 64 columns."""
    tokens, pages, size, wide, turned = 512, 64, 16, 576, 64

    def prepare() -> Callable[[], object]:
        rows, cache = _draw(tokens, 1, wide), torch.zeros(pages, size, 1, wide, dtype=DTYPE)
        slots = torch.randperm(pages * size, generator=torch.Generator().manual_seed(1))[:tokens]
        angle = _draw(tokens, turned // 2, dtype=torch.float32)
        rope = (angle.cos(), angle.sin(), torch.arange(tokens))
        return lambda: tm.kv_cache_append(
            cache, None, rows, None, slots, rope=rope, rope_offset=wide - turned,
            backend="emulated",
        )  # fmt: skip

    minimum = tokens * (2 * wide * DTYPE.itemsize + turned * 4 + 16)
    yield _case(f"{tokens} latent rows", minimum, prepare)


def gate() -> Iterator[CounterCase]:
    tokens, batch = 64, 8

    def prepare() -> Callable[[], object]:
        q, mean = _draw(batch, tokens, HEADS, DIM), _draw(batch, 1, HEADS, DIM)
        return lambda: tm.query_similarity_gate(q, mean, backend="emulated")

    yield _case(f"{batch} x {tokens} queries", batch * (tokens + 1) * HEADS * ROW, prepare)


PER = f"KiB that must move; H={HEADS}, D={DIM}, {str(DTYPE)[6:]}"
COUNTED = {
    "block_pool_keys": Counted(PER, pool),
    "block_pool_keys_update": Counted(PER, pool_update),
    "delta_attention_decode": Counted(PER, delta_state),
    "kv_cache_append": Counted(PER, append),
    "kv_cache_compact": Counted(PER, compact),
    "linear_attention_decode": Counted(PER, state),
    "merge_attention_states": Counted(PER, merge),
    "query_similarity_gate": Counted(PER, gate),
}
