"""Cases of topk_select: scores distributed as in attention, rows with many ties, and hints."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Case, Run, place
from .packages import builders

ROWS = {8192: 32, 65536: 8, 1 << 20: 2}
COUNTS = (64, 256, 1024, 2048)


def cases() -> Iterator[Case]:
    for columns, rows in ROWS.items():
        for k in COUNTS:
            yield build_case("normal", rows, columns, k, torch.float32)
        for kind in ("equal", "relu"):
            yield build_case(kind, rows, columns, 512, torch.float32)
    yield build_case("normal", ROWS[65536], 65536, 512, torch.bfloat16)
    yield build_case("99.9 % ties", 2, 1 << 20, 512, torch.float32)
    for columns, k in ((8192, 512), (65536, 512), (65536, 2048), (1 << 20, 2048)):
        yield _hinted(ROWS[columns], columns, k)


def scores_of(kind: str, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, columns, generator=generator)
    if kind == "equal":
        return torch.full_like(scores, 0.5)
    if kind == "relu":
        return scores.relu()
    if kind == "99.9 % ties":
        tied = torch.rand(rows, columns, generator=generator) < 0.999
        return torch.where(tied, 0.5, scores)
    return scores


def hints_of(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k maximum positions of each row, one tenth replaced by random ones, in ascending
    order."""
    generator = torch.Generator().manual_seed(1)
    best = tm.topk_select(scores, k)[0].cpu()
    anywhere = torch.randint(scores.shape[1], best.shape, generator=generator, dtype=torch.int32)
    wrong = torch.rand(best.shape, generator=generator) < 0.1
    return torch.where(wrong, anywhere, best).sort(1)[0].to(scores.device)


def _hinted(rows: int, columns: int, k: int) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        scores = place(scores_of("normal", rows, columns))
        hints = hints_of(scores, k)
        return lambda: tm.topk_select(scores, k, previous=hints), {
            "without hints": lambda: lambda: tm.topk_select(scores, k),
        }

    return Case(
        "topk_select",
        f"hints, 90 % right, {rows} x {columns} k={k}",
        torch.float32,
        float(rows * columns),
        float(rows * columns * 4 + 2 * rows * k * 4),
        prepare,
    )


def build_case(kind: str, rows: int, columns: int, k: int, dtype: torch.dtype) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        scores = place(scores_of(kind, rows, columns).to(dtype))
        peers = builders(
            "topk_select", [scores], lambda: tm.topk_select(scores, k)[0],
            lambda forward, tensors: lambda: forward(*tensors), k=k,
        )  # fmt: skip
        return lambda: tm.topk_select(scores, k), {
            "topk + sort": lambda: lambda: torch.topk(scores, k)[1].sort(),
            "clone of the scores": lambda: scores.clone,
            **peers,
        }

    return Case(
        "topk_select",
        f"{kind} {rows} x {columns} k={k}",
        dtype,
        float(rows * columns),
        float(rows * columns * dtype.itemsize + rows * k * 4),
        prepare,
    )
