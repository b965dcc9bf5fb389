"""Cases of segment_reduce, bound by row bandwidth: words, merged tokens, one long mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import tokenmill as tm

from .case import Absent, Case, Run, place

TOKENS, CHANNELS = 200_000, 256
PEER = {"sum": "sum", "mean": "mean", "amax": "max"}


def cases() -> Iterator[Case]:
    for reduce in ("sum", "mean", "amax"):
        yield _case("ragged words", TOKENS // 8, reduce, torch.float32)
    yield _case("ragged words", TOKENS // 8, "sum", torch.bfloat16)
    yield _case("permuted", TOKENS // 8, "sum", torch.float32, permuted=True)
    yield _case("one segment", 1, "sum", torch.float32)
    for reduce in ("sum", "amax"):
        yield _case("ragged words", TOKENS // 8, reduce, torch.float32, backward=True)


def _offsets(segments: int, generator: torch.Generator) -> torch.Tensor:
    inner = torch.randint(TOKENS + 1, (segments - 1,), generator=generator).sort().values
    return torch.cat([torch.tensor([0]), inner, torch.tensor([TOKENS])])


def _case(
    name: str,
    segments: int,
    reduce: str,
    dtype: torch.dtype,
    *,
    permuted: bool = False,
    backward: bool = False,
) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(TOKENS, CHANNELS, generator=generator).to(dtype)
        x = place(drawn).requires_grad_(backward)
        ends = _offsets(segments, generator)
        offsets, lengths = place(ends.int()), place(ends.diff())
        segment = place(torch.arange(segments).repeat_interleave(ends.diff()))
        perm = place(torch.randperm(TOKENS, generator=generator).int()) if permuted else None
        rows = segment if perm is None else torch.empty_like(segment).scatter_(
            0, perm.long(), segment
        )  # fmt: skip

        def ours() -> torch.Tensor:
            y = tm.segment_reduce(x, offsets, perm=perm, reduce=reduce)
            assert isinstance(y, torch.Tensor)
            return y

        def index_add() -> torch.Tensor:
            return x.new_zeros(segments, CHANNELS).index_add(0, rows, x)

        def segment_reduce() -> torch.Tensor:
            return torch.segment_reduce(x, PEER[reduce], lengths=lengths, unsafe=True)

        def run_of(function: Callable[[], torch.Tensor]) -> Run:
            if not backward:
                return function
            y = function()
            dy = torch.ones_like(y)
            return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)

        def build_index_add() -> Run:
            if reduce != "sum":
                raise Absent("only adds")
            return run_of(index_add)

        def build_segment_reduce() -> Run:
            if permuted:
                raise Absent("takes rows in their order")
            return run_of(segment_reduce)

        return run_of(ours), {
            "index_add": build_index_add,
            "torch.segment_reduce": build_segment_reduce,
        }

    elements = (TOKENS + segments) * CHANNELS
    return Case(
        "segment_reduce",
        f"{name} {reduce}",
        dtype,
        float(TOKENS * CHANNELS),
        float(elements * dtype.itemsize),
        prepare,
        pass_name="backward" if backward else "forward",
    )
