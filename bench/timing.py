"""Interleaved timing in one process.

One thread: processor time of the process, some of whose peers compute in threads of their own;
other processes do not lengthen it. The median of all rounds is quoted. More threads: wall time, of
which the minimum is quoted, because waiting for a preempted thread spoils every other statistic. A
call begins when the threads of the call before it sleep: thread pools spin for some milliseconds. A
call that is shorter than MIN_SAMPLE is repeated: a sample is the mean of its calls after the first.
A GPU: bench/gpu.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .interval import Interval, median_interval

Run = Callable[[], object]
Measure = Callable[[Run], float]  # seconds of a call
SLOW = 5.0  # seconds
MIN_SAMPLE = 1e-3  # seconds
MAX_CALLS = 1000  # in a sample
MAX_WAIT = 0.2  # seconds
ROUNDS = 5  # min rounds if time permits


@dataclass(frozen=True)
class Timing:
    samples: tuple[float, ...]  # seconds

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def rounds(self) -> int:
        return len(self.samples)

    @property
    def interval(self) -> Interval:
        """Confidence interval of the median."""
        return median_interval(self.samples)


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
    seconds: float,
    threads: int = 1,
    tick: Callable[[], None] = lambda: None,
    on_error: Callable[[str, Exception], None] = _raise,
    measure: Measure | None = None,
    limited: bool = False,
) -> dict[str, Timing]:
    """Times the runs in turn, A B C A B C ..., for about `seconds` and at least ROUNDS rounds; slow
    runs take part only in the first two. A run whose first call fails is left out, unless on_error
    raises. measure: how a call is timed; None: the clock for this number of threads. limited: the
    first calls count towards the time, runs that would begin after it are left out, and one round
    is enough."""
    measure = measure or cpu_seconds(threads)
    samples: dict[str, list[float]] = {}
    with use_threads(threads):
        end = time.perf_counter() + seconds
        slow = set()
        for name, run in runs.items():
            try:
                if limited and samples and time.perf_counter() > end:
                    raise TimeoutError("no time was left")
                if measure(run) > SLOW:
                    slow.add(name)
            except Exception as error:
                on_error(name, error)
            else:
                samples[name] = []
        if not limited:
            end = time.perf_counter() + seconds
        minimum, done = 1 if limited else ROUNDS, 0
        while samples and (time.perf_counter() < end or done < minimum):
            for name, times in samples.items():
                if name not in slow or done < 2:
                    times.append(measure(runs[name]))
            done += 1
            tick()
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def cpu_seconds(threads: int) -> Measure:
    clock = time.process_time if threads == 1 else time.perf_counter

    def seconds(run: Run, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    def measure(run: Run) -> float:
        _wait_for_threads()
        once = seconds(run, 1)
        calls = min(math.ceil(MIN_SAMPLE / max(once, 1e-9)), MAX_CALLS)
        return once if calls == 1 else seconds(run, calls)

    return measure


def _wait_for_threads() -> None:
    """Until all threads but this one sleep, or for MAX_WAIT. Processor time would not show it: the
    kernel adds that of a running thread at its next tick."""
    tasks, own = Path("/proc/self/task"), str(threading.get_native_id())
    end = time.perf_counter() + MAX_WAIT
    while any(name != own and _runs(tasks / name) for name in os.listdir(tasks)):
        if time.perf_counter() > end:
            return
        time.sleep(1e-3)


def _runs(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:  # the thread has ended
        return False
