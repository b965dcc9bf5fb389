"""Interleaved timing in one process.

One thread: the processor time of the thread, which a busy neighbour does not lengthen; the median
of all rounds is the figure to quote. More threads: wall time, of which the minimum is quoted,
because threads that wait for a preempted one spoil every other statistic. A GPU: the time between
events around the call, which it has finished before the next one starts.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Run = Callable[[], object]
SLOW = 5.0  # seconds


@dataclass(frozen=True)
class Timing:
    median: float  # seconds
    best: float
    rounds: int


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _raise(name: str, error: Exception) -> None:
    raise error


def interleave(
    runs: dict[str, Run],
    *,
    threads: int,
    seconds: float,
    tick: Callable[[], None] = lambda: None,
    on_error: Callable[[str, Exception], None] = _raise,
    gpu: bool = False,
) -> dict[str, Timing]:
    """Times the runs in turn, A B C A B C ..., for about `seconds` and at least 5 rounds; slow ones
    take part in the first two. One whose first call fails is left out, unless on_error raises."""
    measure = _gpu_seconds if gpu else _cpu_seconds(threads)
    samples: dict[str, list[float]] = {}
    with use_threads(threads):
        slow = set()
        for name, run in runs.items():
            try:
                if measure(run) > SLOW:
                    slow.add(name)
            except Exception as error:
                on_error(name, error)
            else:
                samples[name] = []
        end = time.perf_counter() + seconds
        rounds = 0
        while time.perf_counter() < end or rounds < 5:
            for name, times in samples.items():
                if name not in slow or rounds < 2:
                    times.append(measure(runs[name]))
            rounds += 1
            tick()
    return {
        name: Timing(statistics.median(times), min(times), len(times))
        for name, times in samples.items()
    }


def _cpu_seconds(threads: int) -> Callable[[Run], float]:
    clock = time.thread_time if threads == 1 else time.perf_counter

    def measure(run: Run) -> float:
        start = clock()
        run()
        return clock() - start

    return measure


def _gpu_seconds(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_flops(dtype: torch.dtype, gpu: bool = False) -> float:
    """Measured multiply-add peak for the arithmetic that serves a dtype: of one thread, or a GPU's
    rate in a large product of matrices (float32 in TF32, as our kernels compute it)."""
    if gpu:
        return _gpu_product_rate(dtype)
    isa = torch.ops.tokenmill.cpu_isa()
    wide = dtype == torch.bfloat16 and isa == "avx512_bf16"
    return torch.ops.tokenmill.cpu_peak_flops("bfloat16" if wide else "float32")


def _gpu_product_rate(dtype: torch.dtype) -> float:
    n = 8192
    x = torch.randn(n, n, device="cuda").to(dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        timing = interleave({"product": lambda: x @ x}, threads=1, seconds=0.5, gpu=True)["product"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2.0 * n**3 / timing.median


def copy_bandwidth(gpu: bool = False) -> float:
    """Bytes per second, read and written, of a large copy (on a CPU: on one thread)."""
    source = torch.zeros(1 << (28 if gpu else 24), device="cuda" if gpu else "cpu")
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source)}
    run = interleave(runs, threads=1, seconds=0.3, gpu=gpu)["copy"]
    return 2 * source.numel() * 4 / run.best
