"""Cases of the operators that move tokens: bytes moved beyond the minimum."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenmill as tm

from .case import Counted, CounterCase, products

B, N, C, K, DTYPE = 2, 577, 256, 400, torch.float16
ROW = C * DTYPE.itemsize
SIDE, SEGMENT = 24, 8  # side of a map, mean tokens per segment


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPE)


def _case(
    title: str,
    min_bytes: float,
    prepare: Callable[[], Callable[[], object]],
    min_mma: float = 0,
) -> CounterCase:
    return CounterCase(title, min_bytes / 1024, min_bytes, min_mma, prepare)


def _lists() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(N - 1, generator=generator) for _ in range(B)]).int()
    return order[:, :K].contiguous(), order[:, K:].sort(1).values


def gather() -> Iterator[CounterCase]:
    def prepare() -> Callable[[], object]:
        x, (keep, _) = _draw(B, N, C), _lists()
        return lambda: tm.gather_tokens(x, keep, backend="emulated")

    yield _case(f"{B} x {K} of {N} rows of {C}", B * K * (2 * ROW + 4), prepare)


def scatter() -> Iterator[CounterCase]:
    def prepare() -> Callable[[], object]:
        base, (keep, _) = _draw(B, N, C), _lists()
        y = _draw(B, K, C)
        return lambda: tm.scatter_tokens(y, keep, base, backend="emulated")

    yield _case(f"{B} x {K} of {N} rows of {C}", B * (2 * N * ROW + 4 * K), prepare)


def fuse() -> Iterator[CounterCase]:
    def prepare(backward: bool) -> Callable[[], object]:
        x, (keep, rest) = _draw(B, N, C).requires_grad_(backward), _lists()
        weight = torch.rand(B, N - 1, requires_grad=backward)

        def run() -> Tensor:
            return tm.gather_fuse(x, keep, rest, weight, backend="emulated")

        if not backward:
            return run
        out = run()
        cotangent = _draw(*out.shape)
        return lambda: torch.autograd.grad(out, (x, weight), cotangent, retain_graph=True)

    rows = B * (N + K + 2) * ROW
    yield _case(f"{B} x {N} x {C}, {K} kept", rows + B * N * 8, lambda: prepare(False))
    more = B * (N - 1 - K) * ROW
    yield _case("... backward", rows + more + B * N * 12, lambda: prepare(True))


def segments() -> Iterator[CounterCase]:
    tokens, count = B * N, B * N // SEGMENT

    def prepare(reduce: str) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(2)
        cuts = torch.randint(0, tokens + 1, (count - 1,), generator=generator).sort().values
        offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]).int()
        x = _draw(tokens, C)
        return lambda: tm.segment_reduce(x, offsets, reduce=reduce, backend="emulated")

    minimum = (tokens + count) * ROW + 8 * count
    yield _case(f"sum of {tokens} rows of {C}", minimum, lambda: prepare("sum"))
    yield _case("... maximum", minimum + count * C * 4, lambda: prepare("amax"))


def pool() -> Iterator[CounterCase]:
    def prepare(mode: str, backward: bool = False) -> Callable[[], object]:
        x = _draw(B, SIDE, SIDE, C).requires_grad_(backward)

        def run() -> Tensor:
            return tm.local_pool(x, 3, mode=mode, subtract_input=mode == "avg", backend="emulated")

        if not backward:
            return run
        out = run()
        cotangent = _draw(*out.shape)
        return lambda: torch.autograd.grad(out, x, cotangent, retain_graph=True)

    minimum = 2 * B * SIDE * SIDE * ROW
    yield _case(f"mean of 3 x 3 minus input, {B} x {SIDE} x {SIDE} x {C}", minimum,
                lambda: prepare("avg"))  # fmt: skip
    yield _case("... backward", minimum, lambda: prepare("avg", True))
    yield _case("maximum of 3 x 3", minimum, lambda: prepare("max"))


def partition() -> Iterator[CounterCase]:
    def prepare() -> Callable[[], object]:
        scores = _draw(8, N).float()
        return lambda: tm.topk_partition(scores, N // 2, backend="emulated")

    yield _case(f"8 x {N}, half of them", 8 * N * 8, prepare)


def mask() -> Iterator[CounterCase]:
    def prepare(tokens: int) -> Callable[[], object]:
        taken = torch.rand(8, tokens, generator=torch.Generator().manual_seed(3)) < 0.5
        return lambda: tm.mask_partition(taken, backend="emulated")

    for tokens in (1024, N):  # half of the indices are -1
        yield _case(f"8 x {tokens}, half of them", 8 * tokens * 7,
                    functools.partial(prepare, tokens))  # fmt: skip


def match() -> Iterator[CounterCase]:
    rows, channels = 512, 64

    def prepare() -> Callable[[], object]:
        x = _draw(1, 2 * rows, channels)
        return lambda: tm.best_match(x[:, ::2], x[:, 1::2], normalize=True, backend="emulated")

    minimum = 2 * rows * channels * DTYPE.itemsize + 8 * rows
    mma = products(rows * rows * channels, DTYPE)
    yield _case(f"{rows} of {rows} rows of {channels}", minimum, prepare, mma)


def clusters() -> Iterator[CounterCase]:
    grid, iters = 8, 2

    def prepare() -> Callable[[], object]:
        x = _draw(1, SIDE, SIDE, C)
        return lambda: tm.cluster_tokens(x, grid, iters=iters, tau=0.01, backend="emulated")

    minimum = SIDE * SIDE * (ROW + 4) + grid * grid * (ROW + 4)
    yield _case(f"{SIDE} x {SIDE} to {grid} x {grid}, {iters} iterations", minimum, prepare)


def reconstruct() -> Iterator[CounterCase]:
    count, k = 64, 3

    def prepare() -> Callable[[], object]:
        features, centroids, values = _draw(1, N, C), _draw(1, count, C), _draw(1, count, C)
        return lambda: tm.reconstruct_tokens(
            features, centroids, values, k=k, tau=0.01, backend="emulated"
        )

    yield _case(f"{N} of {count}, {k} each", 2 * (N + count) * ROW + 8 * k * N, prepare)


PER = "KiB that must move"
COUNTED = {
    "best_match": Counted(PER, match),
    "cluster_tokens": Counted(PER, clusters),
    "gather_fuse": Counted(PER, fuse),
    "gather_tokens": Counted(PER, gather),
    "local_pool": Counted(PER, pool),
    "mask_partition": Counted(PER, mask),
    "reconstruct_tokens": Counted(PER, reconstruct),
    "scatter_tokens": Counted(PER, scatter),
    "segment_reduce": Counted(PER, segments),
    "topk_partition": Counted(PER, partition),
}
