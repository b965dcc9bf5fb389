"""Three timing methods of a call on a GPU.

    call     between events around the call, on an idle device: the wait of an eager caller,
             including the launches of every kernel
    graph    between events around the replay of a CUDA graph of the call: the wait of a captured
             model
    kernels  sum of the profiler's kernel times: kernel work only, without gaps

Each starts with a cold L2 cache, after writing more bytes than it holds. Repetitions of the call
and of the graph are interleaved with the peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .timing import Measure, Run, Timing, interleave

PROFILED = 3  # profiled calls
SHARES = {"call": 0.6, "graph": 0.3}  # share of the time; the profiler takes PROFILED calls


class Event(Protocol):
    def record(self) -> object: ...
    def synchronize(self) -> object: ...
    def elapsed_time(self, end: Any) -> float: ...  # milliseconds


class Device(Protocol):
    """Device interface of the timing methods. Tests implement it without a GPU."""

    def event(self) -> Event: ...

    def synchronize(self) -> None: ...

    def flush(self) -> None:
        """Evicts the L2 cache."""

    def capture(self, run: Run) -> Run:
        """Returns a replay of the launches of run. Raises if they cannot be captured."""

    def kernel_seconds(self, run: Run) -> float:
        """Sum of kernel times of one call. Raises if no profiler is available."""


class CudaDevice:
    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self._flushed = torch.empty(max(2 * cache, 1 << 20), dtype=torch.int8, device="cuda")

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        self._flushed.zero_()

    def capture(self, run: Run) -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture requires lazily created state to exist
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def kernel_seconds(self, run: Run) -> float:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self.flush()
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            self.synchronize()
        microseconds = [
            entry.self_device_time_total
            for entry in found.key_averages()
            if entry.device_type == DeviceType.CUDA and not entry.is_user_annotation
        ]
        if not microseconds:
            raise RuntimeError("the profiler saw no kernel (is CUPTI there?)")
        return sum(microseconds) / 1e6


def event_seconds(device: Device, cold: bool = True) -> Measure:
    """Times a call between events on an idle device, with a cold L2 cache, or with the contents
    that the previous run left."""

    def measure(run: Run) -> float:
        if cold:
            device.flush()
        device.synchronize()
        start, end = device.event(), device.event()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return measure


Times = dict[str, dict[str, Timing]]
Missing = dict[str, dict[str, str]]


def times(
    device: Device,
    runs: dict[str, Run],
    *,
    seconds: float,
    tick: Callable[[], None],
    on_error: Callable[[str, Exception], None],
    limited: bool = False,
) -> tuple[Times, Missing]:
    """Timings by method and run, and the runs that a method could not time, with the reason."""
    measure = event_seconds(device)
    begin = time.perf_counter()
    found: Times = {
        "call": interleave(
            runs, seconds=seconds * SHARES["call"], tick=tick, on_error=on_error, measure=measure,
            limited=limited,
        )
    }  # fmt: skip
    missing: Missing = {"graph": {}, "kernels": {}}
    replays: dict[str, Run] = {}
    timed = {name: run for name, run in runs.items() if name in found["call"]}
    left = seconds - (time.perf_counter() - begin)
    if limited and left <= 0:
        why = "no time was left"
        return found, {method: dict.fromkeys(timed, why) for method in missing}
    for name, run in timed.items():
        try:
            replays[name] = device.capture(run)
        except Exception as error:
            missing["graph"][name] = _words(error)
    found["graph"] = interleave(
        replays, seconds=seconds * SHARES["graph"], tick=tick, measure=measure, limited=limited,
        on_error=lambda name, error: missing["graph"].update({name: _words(error)}),
    )  # fmt: skip
    found["kernels"] = {}
    for name, run in timed.items():
        try:
            samples = [device.kernel_seconds(run) for _ in range(PROFILED)]
        except Exception as error:
            missing["kernels"][name] = _words(error)
        else:
            found["kernels"][name] = Timing(tuple(samples))
        tick()
    return found, missing


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
