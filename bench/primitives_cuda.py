"""Primitives of a GPU: through torch, and where torch has no call, through
torch.ops.tokenmill.gpu_probe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .gpu import Device, event_seconds
from .probe import Probe
from .timing import Measure, Run, interleave

THREADS, CHAINS = 256, 8  # threads per CTA of gpu_probe; independent chains per thread
NODES = 100  # nodes per graph, to amortize the graph launch


@dataclass(frozen=True)
class Sizes:
    memory: int  # bytes of a tensor larger than all caches
    cache: int  # bytes of a tensor, two of which fit in the L2 cache
    product: int  # rows and columns of matrices
    updates: int  # atomic additions
    launches: int
    multiprocessors: int
    steps: int  # iterations of a probe's loop

    @staticmethod
    def of_this_device() -> Sizes:
        device = torch.cuda.get_device_properties()
        cache = max(device.L2_cache_size // 8, 1 << 18)
        return Sizes(1 << 30, cache, 8192, 1 << 22, 1000, device.multi_processor_count, 1 << 14)


def probes(device: Device, where: str, sizes: Sizes) -> Iterator[Probe]:
    cold, warm = event_seconds(device), event_seconds(device, cold=False)
    for of in ("copy", "read"):
        moved = sizes.memory * (2 if of == "copy" else 1)
        facts = {"bytes": moved, "how": "cold"}
        yield Probe(of, "B/s", _rate(cold, _traffic(of, sizes.memory, where), moved), facts)
    for of in ("copy", "read"):
        moved = sizes.cache * (2 if of == "copy" else 1)
        graph = _graph(device, _traffic(of, sizes.cache, where))
        read = _rate(warm, graph, moved * NODES)
        yield Probe(f"L2 {of}", "B/s", read, {"bytes": moved, "how": f"graph of {NODES}"})
    yield from _products(cold, where, sizes.product)
    count = sizes.cache // 4
    exps = _graph(device, lambda: _in_place(torch.exp_, torch.zeros(count, device=where)))
    how = f"torch, L2, graph of {NODES}: at least"
    yield Probe("exp", "1/s", _rate(warm, exps, count * NODES), {"dtype": "float32", "how": how})
    for spread in (1, 1 << 16):
        added = _atomics(sizes.updates, spread, where)
        facts = {"how": f"float32, {spread} address(es)", "dtype": "float32"}
        yield Probe("atomic add", "1/s", _rate(cold, added, sizes.updates), facts)
    yield Probe(
        "launch", "s", _launches(device, where, sizes.launches), {"how": "one after another"}
    )
    yield Probe("launch and wait", "s", _waits(device, where), {})
    yield Probe("graph launch and wait", "s", _replays(device, where), {"how": "of one kernel"})
    yield Probe("graph node", "s", _nodes(device, where), {"how": f"of {NODES} kernels"})
    yield from _own_kernels(device, where, sizes)


def _own_kernels(device: Device, where: str, sizes: Sizes) -> Iterator[Probe]:
    """Measured warm: the kernels do not read memory."""
    warm, blocks = event_seconds(device, cold=False), 4 * sizes.multiprocessors
    work = float(blocks * THREADS * sizes.steps)
    read = _rate(warm, lambda: _probe("shared", blocks, sizes.steps, where), 16 * work)
    yield Probe("shared memory read", "B/s", read, {"how": "16 bytes a lane"})
    exps = _rate(warm, lambda: _probe("exp2", blocks, sizes.steps, where), CHAINS * work)
    yield Probe("exp2", "1/s", exps, {"dtype": "float32", "how": "special function unit"})

    def barriers(seconds: float) -> list[float]:
        run = _probe("barrier", sizes.multiprocessors, sizes.steps, where)
        timing = interleave({"run": run}, seconds=seconds, measure=warm)["run"]
        return [t / (sizes.steps + 1) for t in timing.samples]

    yield Probe("grid barrier", "s", barriers, {"how": "a block for each multiprocessor"})


def _probe(of: str, blocks: int, steps: int, where: str) -> Run:
    x = torch.full((4 * THREADS,), 0.5, device=where)
    return lambda: torch.ops.tokenmill.gpu_probe(x, of=of, blocks=blocks, steps=steps)


def _rate(measure: Measure, make: Callable[[], Run], work: float) -> Callable[[float], list[float]]:
    """make allocates, so that a probe's memory is held only while it is measured."""

    def rates(seconds: float) -> list[float]:
        timing = interleave({"run": make()}, seconds=seconds, measure=measure)["run"]
        return [work / t for t in timing.samples]

    return rates


def _traffic(of: str, size: int, where: str) -> Callable[[], Run]:
    def make() -> Run:
        source = torch.zeros(size // 4, dtype=torch.int32, device=where)
        if of == "read":
            return lambda: source.amax()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return make


def _graph(device: Device, make: Callable[[], Run]) -> Callable[[], Run]:
    def captured() -> Run:
        run = make()

        def often() -> None:
            for _ in range(NODES):
                run()

        return device.capture(often)

    return captured


def _in_place(function: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    return lambda: function(x)


def _products(cold: Measure, where: str, n: int) -> Iterator[Probe]:
    work = 2.0 * n**3

    def product(dtype: torch.dtype, tf32: bool = False) -> Callable[[float], list[float]]:
        def make() -> Run:
            x = torch.randn(n, n, device=where).to(dtype)
            return lambda: x @ x

        def rates(seconds: float) -> list[float]:
            with _tf32(tf32):
                return _rate(cold, make, work)(seconds)

        return rates

    for dtype in (torch.float16, torch.bfloat16):
        yield Probe("matmul", "FLOP/s", product(dtype), {"dtype": str(dtype)[6:]})
    facts = {"dtype": "float32", "how": "in TF32"}
    yield Probe("matmul", "FLOP/s", product(torch.float32, tf32=True), facts)
    yield Probe("matmul ieee", "FLOP/s", product(torch.float32), {"dtype": "float32"})
    yield Probe("matmul", "FLOP/s", _rate(cold, lambda: _int8(n, where), work), {"dtype": "int8"})
    facts = {"dtype": "float8_e4m3fn"}
    yield Probe("matmul", "FLOP/s", _rate(cold, lambda: _float8(n, where), work), facts)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _int8(n: int, where: str) -> Run:
    x = torch.ones(n, n, dtype=torch.int8, device=where)
    return lambda: torch._int_mm(x, x)


def _float8(n: int, where: str) -> Run:
    x = torch.ones(n, n, device=where).to(torch.float8_e4m3fn)
    one = torch.ones((), device=where)
    return lambda: torch._scaled_mm(x, x.t(), one, one, out_dtype=torch.bfloat16)


def _atomics(count: int, spread: int, where: str) -> Callable[[], Run]:
    def make() -> Run:
        sums = torch.zeros(spread, device=where)
        index = torch.arange(count, device=where) % spread
        ones = torch.ones(count, device=where)
        return lambda: sums.index_add_(0, index, ones)

    return make


def _tiny(where: str) -> Run:
    x = torch.zeros(1, device=where)
    return lambda: x.add_(1.0)


def _wall(device: Device, run: Run, often: int, seconds: float) -> list[float]:
    """Seconds per call over `often` calls, including the final synchronization."""

    def measure(run: Run) -> float:
        device.synchronize()
        start = time.perf_counter()
        for _ in range(often):
            run()
        device.synchronize()
        return (time.perf_counter() - start) / often

    return [*interleave({"run": run}, seconds=seconds, measure=measure)["run"].samples]


def _launches(device: Device, where: str, often: int) -> Callable[[float], list[float]]:
    return lambda seconds: _wall(device, _tiny(where), often, seconds)


def _waits(device: Device, where: str) -> Callable[[float], list[float]]:
    return lambda seconds: _wall(device, _tiny(where), 1, seconds)


def _replays(device: Device, where: str) -> Callable[[float], list[float]]:
    return lambda seconds: _wall(device, device.capture(_tiny(where)), 1, seconds)


def _nodes(device: Device, where: str) -> Callable[[float], list[float]]:
    def measure(seconds: float) -> list[float]:
        replay = _graph(device, lambda: _tiny(where))()
        timing = interleave(
            {"run": replay}, seconds=seconds, measure=event_seconds(device, cold=False)
        )["run"]
        return [t / NODES for t in timing.samples]

    return measure
