"""Cases of kv_cache_append: a prompt, or one token of many requests, into pages; latent rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Case, Run, place

HEADS, DIM, PAGE = 8, 128, 16
FLOAT8 = torch.float8_e4m3fn


def cases() -> Iterator[Case]:
    bfloat16 = torch.bfloat16
    for dtype in (torch.float32, bfloat16):
        yield _case("4096 tokens", 4096, dtype)
    yield _case("4096 tokens, 32 query heads", 4096, bfloat16, query_heads=32)
    for scale in (None, "head", "token"):
        yield _case("4096 tokens", 4096, bfloat16, FLOAT8, scale)
    for scale in ("head", "token"):
        yield _case("64 tokens, 32 query heads", 64, bfloat16, FLOAT8, scale, 32)
    for cache_dtype in (bfloat16, FLOAT8):
        yield _latent("4096 latent rows", 4096, bfloat16, cache_dtype)


def _case(
    name: str,
    tokens: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    scale: str | None = None,
    query_heads: int = 0,
) -> Case:
    pages = 2 * max(tokens // PAGE, tokens)
    to = cache_dtype or dtype

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        g = torch.Generator().manual_seed(0)

        def draw(heads: int) -> Tensor:
            return place(torch.randn(tokens, heads, DIM, generator=g).to(dtype))

        k, v = draw(HEADS), draw(HEADS)
        q = draw(query_heads) if query_heads else None
        k_cache, v_cache = (place(torch.zeros(pages, PAGE, HEADS, DIM).to(to)) for _ in range(2))
        # A prompt fills whole pages; batched tokens go to the ends of their pages.
        order, length = torch.randperm(pages, generator=g), PAGE if tokens > 64 else 1
        slots = order[: tokens // length, None] * PAGE + torch.arange(length)
        slots = place(slots.flatten())
        angle = torch.rand(tokens, DIM // 2, generator=g) * 6.28
        rope = place(angle.cos()), place(angle.sin()), place(torch.arange(tokens))
        shape = {"head": (HEADS,), "token": (pages, PAGE, HEADS)}
        scales = [place(torch.ones(shape[scale])) if scale else None for _ in range(2)]

        def run() -> object:
            return tm.kv_cache_append(
                k_cache, v_cache, k, v, slots, q=q, rope=rope, k_scale=scales[0],
                v_scale=scales[1],
            )  # fmt: skip

        caches = [k_cache, v_cache]
        return run, {"eager": lambda: lambda: _eager(caches, k, v, slots, q, rope, scales)}

    held = f" into {str(to)[6:]}" + (f", scales of {scale}s" if scale else "")
    elements, turned = 2.0 * tokens * HEADS * DIM, tokens * query_heads * DIM
    moved = elements * (dtype.itemsize + to.itemsize) + 2.0 * turned * dtype.itemsize
    moved += tokens * DIM * 4  # rotary tables
    work = elements + 3.0 * (elements / 2 + turned)
    return Case("kv_cache_append", name + held, dtype, work, moved, prepare)


def _latent(name: str, tokens: int, dtype: torch.dtype, to: torch.dtype) -> Case:
    """Latent rows of one head: 512 columns, and 64 columns with rotary embedding; float8 has a
    scale per row."""
    wide, turned = 576, 64

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        g = torch.Generator().manual_seed(0)
        rows = place(torch.randn(tokens, 1, wide, generator=g).to(dtype))
        cache = place(torch.zeros(2 * tokens // PAGE, PAGE, 1, wide).to(to))
        slots = place(torch.randperm(2 * tokens, generator=g)[:tokens])
        angle = torch.rand(tokens, turned // 2, generator=g) * 6.28
        rope = place(angle.cos()), place(angle.sin()), place(torch.arange(tokens))
        scale = place(torch.ones(cache.shape[:3])) if to == FLOAT8 else None

        def run() -> object:
            return tm.kv_cache_append(
                cache, None, rows, None, slots, rope=rope, rope_offset=wide - turned, k_scale=scale
            )

        def eager() -> None:
            cos, sin = (t[rope[2]][:, None] for t in rope[:2])
            a, b = rows[..., wide - turned :].float().chunk(2, -1)
            parts = rows[..., : wide - turned].float(), a * cos - b * sin, b * cos + a * sin
            _put(cache, slots, torch.cat(parts, -1), scale)

        return run, {"eager": lambda: eager}

    held = f" into {str(to)[6:]}" + (", a scale each" if to == FLOAT8 else "")
    moved = tokens * (wide * (dtype.itemsize + to.itemsize) + turned * 4.0)
    return Case("kv_cache_append", name + held, dtype, 4.0 * tokens * wide, moved, prepare)


def _put(cache: Tensor, slots: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    """Copies float32 rows. float8 is written as bytes, since index_copy_ does not support it."""
    flat = cache.view(-1, *cache.shape[2:])
    if cache.dtype != FLOAT8:
        flat.index_copy_(0, slots, rows.to(cache.dtype))
        return
    if scale is not None and scale.dim() == 3:
        each = (rows.abs().amax(-1) / 448).clamp_min(1e-12)
        scale.view(-1, scale.shape[2]).index_copy_(0, slots, each)
        rows = rows / each[..., None]
    elif scale is not None:
        rows = rows / scale[:, None]
    codes = rows.clamp(-448, 448).to(FLOAT8).view(torch.uint8)
    flat.view(torch.uint8).index_copy_(0, slots, codes)


def _eager(
    caches: list[Tensor],
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    q: Tensor | None,
    rope: tuple[Tensor, Tensor, Tensor],
    scales: list[Tensor | None],
) -> object:
    """Rotates, casts and copies rows."""
    cos, sin = (t[rope[2]][:, None] for t in rope[:2])

    def turned(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    for cache, rows, scale in zip(caches, (turned(k), v), scales, strict=True):
        _put(cache, slots, rows if cache.dtype == rows.dtype else rows.float(), scale)
    return None if q is None else turned(q)
