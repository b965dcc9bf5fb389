"""Interleaved timing in one process.

One thread: the processor time of the thread, which a busy neighbour does not lengthen; the median
of all rounds is the figure to quote. More threads: wall time, of which the minimum is quoted,
because threads that wait for a preempted one spoil every other statistic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    median: float  # seconds
    best: float
    rounds: int


def interleave(
    runs: dict[str, Run], *, threads: int, seconds: float, tick: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Times the runs in turn, A B C A B C ..., for about `seconds` and at least 5 rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for run in runs.values():
            run()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(next(iter(samples.values()))) < 5:
            for name, run in runs.items():
                start = clock()
                run()
                samples[name].append(clock() - start)
            tick()
    finally:
        torch.set_num_threads(before)
    return {
        name: Timing(statistics.median(times), min(times), len(times))
        for name, times in samples.items()
    }


def peak_flops(dtype: torch.dtype) -> float:
    """Measured multiply-add peak of one thread for the arithmetic that serves a dtype here."""
    isa = torch.ops.tokenmill.cpu_isa()
    wide = dtype == torch.bfloat16 and isa == "avx512_bf16"
    return torch.ops.tokenmill.cpu_peak_flops("bfloat16" if wide else "float32")


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on one thread."""
    source = torch.zeros(1 << 24)
    target = torch.empty_like(source)
    run = interleave({"copy": lambda: target.copy_(source)}, threads=1, seconds=0.3)["copy"]
    return 2 * source.numel() * 4 / run.best
