"""Cases of kv_cache_compact: half of a cache is dropped, or all but sinks and a window."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Case, Run, place

HEADS, DIM, LENGTH = 8, 128, 8192


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("half of 8192", "half", dtype, None, False)
    yield _case("half of 8192, turned", "half", torch.bfloat16, 10000.0, False)
    yield _case("4 and 2044 of 8192, turned", "window", torch.bfloat16, 10000.0, False)
    yield _case("half of 8192, sums", "half", torch.bfloat16, None, True)


def _case(
    name: str, kept: str, dtype: torch.dtype, rerotate: float | None, compensation: bool
) -> Case:
    count = LENGTH // 2 if kept == "half" else 2048

    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        k, v = (
            place(torch.randn(1, LENGTH, HEADS, DIM, generator=generator).to(dtype))
            for _ in range(2)
        )
        keep = torch.randperm(LENGTH, generator=generator)[:count].sort()[0]
        if kept == "window":
            keep = torch.cat([torch.arange(4), torch.arange(LENGTH - 2044, LENGTH)])
        keep = place(keep)
        lists, counts = keep[None].int(), place(torch.tensor([count], dtype=torch.int32))

        def gather() -> Run:
            delta = torch.arange(count, device=keep.device) - keep
            gone = torch.ones(LENGTH, dtype=torch.bool, device=keep.device)
            gone[keep] = False

            def run() -> object:
                if compensation:
                    sums = [c[:, gone].float().sum(1) for c in (k, v)]
                keys, values = k[:, keep], v[:, keep]
                if rerotate:
                    half = DIM // 2
                    step = torch.arange(half, device=keep.device) / -half
                    angle = delta[:, None, None] * rerotate**step
                    a, b = keys.float().chunk(2, -1)
                    cosine, sine = angle.cos(), angle.sin()
                    keys = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1).to(dtype)
                return (keys, values, sums) if compensation else (keys, values)

            return run

        run = lambda: tm.kv_cache_compact(  # noqa: E731
            k, v, lists, counts, rerotate=rerotate, compensation=compensation
        )
        return run, {"gather into a new cache": gather}

    rows = 2 * count + (LENGTH - count if compensation else 0)
    return Case(
        "kv_cache_compact",
        name,
        dtype,
        float(rows * HEADS * DIM),
        float(2 * rows * HEADS * DIM * dtype.itemsize),
        prepare,
    )
