"""The time that a case may take, and its result row: its times, its peers' times, and the binding
ceiling."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenmill import _cli

from . import gpu
from .case import Absent, Case
from .ceilings import Ceilings, bound
from .sensors import Sensors
from .timing import ROUNDS, Timing, interleave, use_threads

OURS = "tokenmill"


@dataclass(frozen=True)
class Bench:
    """Measurement settings: device, threads, ceilings and sensors."""

    threads: int
    ceilings: Ceilings
    device: gpu.Device | None = None  # None: CPU
    sensors: Sensors | None = None

    @property
    def statistic(self) -> str:
        return "median" if self.device or self.threads == 1 else "minimum"

    def figure(self, timing: Timing) -> float:
        return timing.median if self.statistic == "median" else timing.best


class Budget:
    """Time of the cases: either `each` seconds of repetitions per case, or `total` seconds for all
    remaining cases: time that one case leaves is shared by the others."""

    def __init__(
        self,
        each: float,
        total: float | None,
        cases: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.each, self._clock, self._left = each, clock, cases
        self._end = None if total is None else clock() + total

    @property
    def limited(self) -> bool:
        return self._end is not None

    def next(self) -> float | None:
        """Seconds for the next case, including its preparation if the budget is limited; None if no
        time is left."""
        if self._end is None:
            return self.each
        share = (self._end - self._clock()) / max(self._left, 1)
        self._left -= 1
        return share if share > 0 else None


def row_of(case: Case) -> dict[str, Any]:
    """Identifying fields of a row."""
    row: dict[str, Any] = {"op": case.op, "case": case.title, "dtype": str(case.dtype)[6:]}
    if case.length is not None:
        row["length"] = case.length
    return row


def key(row: dict[str, Any]) -> tuple[str, str]:
    """Identity of a row's case."""
    return row["op"], row["case"]


def measure(
    case: Case, bench: Bench, seconds: float, limited: bool, tick: Callable[[], None]
) -> dict[str, Any]:
    """Measures a case. limited: seconds cover the whole case, and one repetition is enough."""
    begin = time.perf_counter()
    if bench.sensors:
        bench.sensors.summary()  # discards readings of a failed case
    absent: dict[str, str] = {}

    def leave_out(name: str, error: Exception) -> None:
        if name == OURS:
            raise error
        # A failing peer is recorded, not raised.
        plain = isinstance(error, Absent | TimeoutError)
        absent[name] = str(error) if plain else _cli.one_line(error)[:100]

    def watch() -> None:
        tick()
        if bench.sensors:
            bench.sensors.read()

    with use_threads(bench.threads):
        ours, builders = case.prepare()
        runs = {OURS: ours}
        for name, build in builders.items():
            try:
                runs[name] = build()
            except Exception as error:
                leave_out(name, error)
        if limited:
            seconds = max(seconds - (time.perf_counter() - begin), 0.0)
        options: dict[str, Any] = {
            "seconds": seconds, "tick": watch, "on_error": leave_out, "limited": limited
        }  # fmt: skip
        missing: gpu.Missing = {}
        if bench.device:
            times, missing = gpu.times(bench.device, runs, **options)
        else:
            times = {"call": interleave(runs, threads=bench.threads, **options)}
    row = _figures(case, bench, times, missing)
    row["absent"] = absent
    if bench.sensors and (read := bench.sensors.summary()):
        row["sensors"] = read
    return row


def _figures(
    case: Case, bench: Bench, times: gpu.Times, missing: gpu.Missing
) -> dict[str, Any]:  # fmt: skip
    call = times["call"]
    seconds = bench.figure(call[OURS])
    row = _timed(bench, call[OURS])
    row |= {"flops": case.work / seconds, "bytes_per_second": case.moved / seconds}
    row |= shares(row, str(case.dtype)[6:], bench.ceilings)
    row |= _methods(OURS, bench, times, missing)
    row["peers"] = {
        name: _timed(bench, timing)
        | {"flops": case.work / bench.figure(timing), "ratio": bench.figure(timing) / seconds}
        | _methods(name, bench, times, missing)
        for name, timing in call.items()
        if name != OURS
    }
    return row


def shares(row: dict[str, Any], dtype: str, ceilings: Ceilings) -> dict[str, Any]:
    """Shares of the ceilings that a row with seconds, flops and bytes_per_second reaches."""
    peak = ceilings.flops[dtype]
    nearer = bound(row, peak, ceilings.bytes_per_second(row["bytes_per_second"] * row["seconds"]))
    return {
        "peak_share": row["flops"] / peak, "bound": nearer.of, "bound_share": nearer.share
    }  # fmt: skip


def _timed(bench: Bench, timing: Timing) -> dict[str, Any]:
    """The quoted time, and the interval of the median."""
    interval = timing.interval
    return {
        "seconds": bench.figure(timing),
        "interval": [interval.low, interval.high],
        "coverage": round(interval.coverage, 4),
        "rounds": timing.rounds,
    }


def _methods(
    name: str, bench: Bench, times: gpu.Times, missing: gpu.Missing
) -> dict[str, Any]:  # fmt: skip
    """The other two times on a GPU, or the reason why they are missing."""
    found: dict[str, Any] = {}
    for method, reasons in missing.items():
        if name in times.get(method, {}):
            found[method] = _timed(bench, times[method][name])
        elif name in reasons:
            found[method] = {"absent": reasons[name]}
    return found


def few(row: dict[str, Any]) -> bool:
    """True if time was too short for the usual number of repetitions."""
    return "error" not in row and row["rounds"] < ROUNDS
