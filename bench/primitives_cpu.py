"""Primitives of a CPU: on one thread, and on all cores."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from .ceilings import multiplies_bfloat16
from .probe import Probe
from .timing import Run, interleave, use_threads

SIZES = [1 << k for k in (15, 18, 20, 22, 24, 26, 28)]  # working sets in bytes
LARGEST = 1 << 30
STEP = 2048  # step of torch.ops.tokenmill.cpu_rate
PRODUCT = 1024  # rows and columns of matrices
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def probes() -> Iterator[Probe]:
    maximum = cores()
    for threads in dict.fromkeys((1, maximum)):
        yield from _arithmetic(threads)
        # Each thread has its own part of the working set.
        parts = [max(size // threads // STEP * STEP, STEP) for size in sizes()]
        for of in ("read", "copy"):
            for part in dict.fromkeys(parts):
                yield _memory(of, part, threads)
    yield Probe("parallel region", "s", _regions(maximum), {"threads": maximum})


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sizes() -> list[int]:
    """Working sets from the first cache to memory: the maximum is twice the last-level cache."""
    try:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        cache = 0
    largest = SIZES[-1]
    while largest < min(2 * cache, LARGEST):
        largest *= 2
    return SIZES if largest == SIZES[-1] else [*SIZES, largest]


def _arithmetic(threads: int) -> Iterator[Probe]:
    loops = ["float32"]
    if multiplies_bfloat16():
        loops.append("bfloat16")
    for dtype in loops:
        peak = _together(threads, functools.partial(torch.ops.tokenmill.cpu_peak_flops, dtype, 1))
        facts = {"dtype": dtype, "threads": threads, "how": "from registers"}
        yield Probe("fma", "FLOP/s", peak, facts)
    for kind in DTYPES:
        facts = {"dtype": str(kind)[6:], "threads": threads, "how": f"torch, n = {PRODUCT}"}
        yield Probe("matmul", "FLOP/s", _product(kind, threads), facts)
    values = _together(threads, lambda: torch.ops.tokenmill.cpu_rate("exp", 0, 1))
    yield Probe("exp", "1/s", values, {"dtype": "float32", "threads": threads})


def _memory(of: str, part: int, threads: int) -> Probe:
    rate = _together(threads, lambda: torch.ops.tokenmill.cpu_rate(of, part, 1))
    return Probe(of, "B/s", rate, {"bytes": part * threads, "threads": threads})


def _together(threads: int, rate: Callable[[], float]) -> Callable[[float], list[float]]:
    """Samples of the sum over threads that measure concurrently, each by its processor time."""

    def measure(seconds: float) -> list[float]:
        begin = threading.Barrier(threads)

        def one(_: int) -> float:
            begin.wait()  # common start: no thread takes the work of two
            return rate()

        with ThreadPoolExecutor(threads) as pool:

            def sample() -> float:
                return sum(pool.map(one, range(threads)))

            return _samples(sample, seconds)

    return measure


def _samples(sample: Callable[[], float], seconds: float) -> list[float]:
    sample()
    found, end = [sample()], time.perf_counter() + seconds
    while time.perf_counter() < end:
        found.append(sample())
    return found


def _product(dtype: torch.dtype, threads: int) -> Callable[[float], list[float]]:
    def measure(seconds: float) -> list[float]:
        x = torch.randn(PRODUCT, PRODUCT).to(dtype)
        runs: dict[str, Run] = {"product": lambda: x @ x}
        timing = interleave(runs, seconds=seconds, threads=threads, limited=True)["product"]
        return [2.0 * PRODUCT**3 / t for t in timing.samples]

    return measure


def _regions(threads: int) -> Callable[[float], list[float]]:
    def measure(seconds: float) -> list[float]:
        with use_threads(threads):
            rates = _samples(lambda: torch.ops.tokenmill.cpu_rate("region", 0, 1), seconds)
        return [1 / rate for rate in rates]

    return measure
