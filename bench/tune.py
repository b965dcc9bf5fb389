"""Tunes knobs on this machine by trying their values: `python -m tokenmill tune [op]`.

A value replaces the default if it is at least 2 % faster in the mean over the knob's benchmarks and
more than 3 % slower in none of them, and both again in a second measurement, since the best of
several noisy figures is biased. Otherwise the default stays. A knob is tuned with the values found
for earlier knobs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenmill import _cli, _explain, _knobs, registry
from tokenmill._knobs import KNOBS, Knob

from . import case as cases_module
from .case import Case, cases, geometric_mean
from .gpu import CudaDevice, event_seconds
from .progress import progress
from .timing import Measure, interleave, use_threads

MIN_GAIN = 1.02  # of the mean, in both measurements
MAX_LOSS = 1.03  # of a single benchmark
SECONDS = 0.2, 4.0  # seconds per measurement: min, max
HEADER = ("knob", "standard", "best", "gain", "of the benchmarks")
Ratios = dict[int, list[float]]  # by value: time / time of the default, per benchmark


@dataclass(frozen=True)
class Found:
    knob: Knob
    best: int
    gain: float = 1.0
    ratios: tuple[float, ...] = ()
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops", nargs="*", type=_cli.operator, help="operators to tune (default: all with knobs)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to tune for (default: the GPU if there is one)",
    )
    parser.add_argument(
        "--threads",
        type=_cli.integer(1, os.cpu_count()),
        default=torch.get_num_threads(),
        metavar="N",
        help="threads of the CPU kernels (default: what torch uses)",
    )
    parser.add_argument(
        "--time-budget",
        type=_cli.duration,
        default=120.0,
        metavar="TIME",
        help="for all knobs together (90s, 10m, 1h30m; default 2m): none begins after it, those "
        "not reached keep what they have, and one that has begun is finished",
    )
    parser.add_argument(
        "--allow-order",
        action="store_true",
        help="also knobs that change the order of sums, and so the last bits of results (which "
        "kernel runs, for one, on compute capability 9.0)",
    )
    parser.add_argument("--list", action="store_true", help="show the knobs and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="measure and show, and write nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0, or 1 if a knob could not be measured."""
    having = list(dict.fromkeys(k.op for k in KNOBS.values()))
    for op in options.ops:
        if op not in having:
            rule = f"must be one with knobs ({', '.join(having)})"
            raise _cli.UsageError(f"op: {rule}; got {op!r}")
    wanted = [k for k in KNOBS.values() if not options.ops or k.op in options.ops]
    if options.list:
        _list(wanted)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        rule = "must be a device of this machine (cpu: there is no GPU)"
        raise _cli.UsageError(f"--device: {rule}; got 'cuda'")
    device = _knobs.device_name(options.device)
    if not device:
        raise _cli.UsageError(
            "--device: GPUs must be of one kind, or CUDA_VISIBLE_DEVICES name one"
        )
    usable = [k for k in wanted if _usable(k, options.device)]
    chosen = [k for k in usable if options.allow_order or not k.order]
    if not chosen:
        why = f"{options.device} has no such knob (tune --list shows all)"
        if usable:
            why = f"those of {options.device} change the order of sums: --allow-order"
        print(f"nothing to tune: {why}")
        return 0
    if not options.dry_run:
        try:
            _knobs.prepare(_knobs.path())
        except OSError as error:
            raise _unwritable(error) from None
    cases_module.device = torch.device(options.device)
    found = _tune(chosen, options, device)
    if not options.dry_run and any(f.ratios for f in found):
        print(f"wrote {_knobs.path()}")
    return 1 if any(f.note.startswith("failed") for f in found) else 0


def _unwritable(error: OSError) -> _cli.UsageError:
    return _cli.UsageError(_cli.unwritable(_knobs.VARIABLE, _knobs.path(), error))


def _list(knobs: list[Knob]) -> None:
    if torch.cuda.is_available():
        torch.cuda.init()  # activates the values tuned for the GPU
    print(f"{'knob':<40}{'runs on':<9}{'value':>8}{'standard':>10}  candidates")
    for knob in knobs:
        standard, value = (
            "table" if knob.backend == "triton" and n == _knobs.TABLE else str(n)
            for n in (knob.standard, _knobs.value(knob.name))
        )
        order = "; order of sums: --allow-order" if knob.order else ""
        tried = " ".join(map(str, knob.candidates))
        print(f"{knob.name:<40}{knob.backend:<9}{value:>8}{standard:>10}  {tried}")
        print(f"    {knob.what}{order}")
    print(f"cache: {_knobs.path()}")


def _usable(knob: Knob, device: str) -> bool:
    backends = ("cpu",) if device == "cpu" else ("cuda", "triton")
    if knob.backend not in backends:
        return False
    spec = registry.get(knob.op)
    if knob.switch:
        major, minor = torch.cuda.get_device_capability()
        return knob.switch in _explain.switches(spec, 10 * major + minor)
    return _explain.kernels(spec, knob.backend) != "-"


def _tune(knobs: list[Knob], options: argparse.Namespace, device: str) -> list[Found]:
    """Tunes one operator after another; results of one are written before the next starts."""
    plans = [(k, [c for c in cases([k.op]) if re.search(k.cases, c.title)]) for k in knobs]
    ops = list(dict.fromkeys(k.op for k in knobs))
    kept: dict[str, int] = {}
    for op in ops:
        kept |= _knobs.entry_of(_knobs.path(), device, op).get("knobs", {})
    for knob in knobs:
        _knobs.put(knob.name, knob.standard)
    measurements = sum(2 * len(chosen) for _, chosen in plans)
    share = options.time_budget / max(measurements, 1)
    measure = event_seconds(CudaDevice()) if options.device == "cuda" else None
    clock = Clock(options, min(max(share, SECONDS[0]), SECONDS[1]), measure)
    found: list[Found] = []
    print(f"{device}, {_threads(options)}")
    print(_line(HEADER))
    with progress(sum(len(chosen) for _, chosen in plans), "tuning") as advance:
        for op in ops:
            of_op = [plan for plan in plans if plan[0].op == op]
            results = []
            for knob, chosen in of_op:
                before = kept.get(knob.name, knob.standard)
                results.append(_tune_knob(knob, before, chosen, clock, advance))
                _knobs.put(knob.name, results[-1].best)
                print(_line(_cells(results[-1])), flush=True)
            found += results
            if not options.dry_run and any(f.ratios for f in results):
                _write(device, op, results, options)
    return found


def _threads(options: argparse.Namespace) -> str:
    return f"{options.threads} thread(s)" if options.device == "cpu" else "one call at a time"


@dataclass(frozen=True)
class Clock:
    """Timing settings and the deadline."""

    options: argparse.Namespace
    seconds: float  # seconds per measurement
    measure: Measure | None = None  # for a GPU
    start: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return time.monotonic() - self.start > self.options.time_budget

    def times(self, knob: Knob, case: Case, values: list[int]) -> dict[int, float]:
        """Seconds of a case for each value that runs."""
        threads = self.options.threads
        failed: dict[str, Exception] = {}
        with _backend(knob), use_threads(threads):
            call, _ = case.prepare()
            runs = {str(v): _with(knob, v, call) for v in values}
            timings = interleave(
                runs, threads=threads, seconds=self.seconds, on_error=failed.__setitem__,
                measure=self.measure,
            )  # fmt: skip
        if error := failed.get(str(knob.standard)):
            raise error
        middle = self.measure is not None or threads == 1
        return {int(v): t.median if middle else t.best for v, t in timings.items()}


@contextlib.contextmanager
def _backend(knob: Knob) -> Iterator[None]:
    """Forces calls to the backend of the knob: a GPU has two."""
    before = os.environ.get("TOKENMILL_BACKEND")
    os.environ["TOKENMILL_BACKEND"] = knob.backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENMILL_BACKEND"]
        else:
            os.environ["TOKENMILL_BACKEND"] = before


def _with(knob: Knob, value: int, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        _knobs.put(knob.name, value)
        return call()

    return run


def _tune_knob(knob: Knob, before: int, chosen: list[Case], clock: Clock, advance: Any) -> Found:
    """before: previous value, kept if tuning does not finish."""
    if why := _turned_off(knob) or ("not reached" if clock.over else ""):
        for _ in chosen:
            advance(done=True)
        return Found(knob, before, note=why)
    values = list(dict.fromkeys((knob.standard, *knob.candidates)))
    try:
        ratios = _measure(knob, chosen, values, clock, advance)
        best = choose(knob.standard, ratios)
        if best == knob.standard:
            return Found(knob, best, ratios=(1.0,) * len(chosen))
        again = _measure(knob, chosen, [knob.standard, best], clock)
        if choose(knob.standard, again) != best:
            return Found(knob, knob.standard, ratios=(1.0,) * len(chosen), note="not confirmed")
        gains = tuple(1 / r for r in again[best])
        return Found(knob, best, geometric_mean(list(gains)), gains)
    except Exception as error:
        return Found(knob, before, note=f"failed: {_cli.one_line(error)}")
    finally:
        _knobs.put(knob.name, knob.standard)


def _turned_off(knob: Knob) -> str:
    """Reason why no value of a knob has an effect: its kernel does not run."""
    off = knob.switch not in ("", knob.name) and not _knobs.value(knob.switch)
    return f"{knob.switch} is 0" if off else ""


def _measure(
    knob: Knob,
    chosen: list[Case],
    values: list[int],
    clock: Clock,
    advance: Callable[..., None] = lambda **_: None,
) -> Ratios:
    """Time ratios of the values that run every benchmark."""
    ratios: Ratios = {v: [] for v in values}
    for case in chosen:
        advance(start=f"{knob.name}, {case.title}")
        times = clock.times(knob, case, values)
        for value in values:
            if value not in times:
                ratios.pop(value, None)
            elif value in ratios:
                ratios[value].append(times[value] / times[knob.standard])
        values = [*ratios]
        advance(done=True)
    return ratios


def choose(standard: int, ratios: Ratios) -> int:
    """The fastest value, or the default unless a value is significantly faster."""
    best = min(ratios, key=lambda value: (geometric_mean(ratios[value]), value != standard))
    if max(ratios[best], default=1.0) > MAX_LOSS:
        return standard
    return best if geometric_mean(ratios[best]) <= 1 / MIN_GAIN else standard


def _write(device: str, op: str, found: list[Found], options: argparse.Namespace) -> None:
    """Writes tuned values. Knobs whose tuning did not finish keep the cached value."""
    tried = {f.knob.name for f in found if f.ratios}
    better = [f for f in found if f.ratios and f.best != f.knob.standard]
    old = _knobs.entry_of(_knobs.path(), device, op)
    entry: dict[str, Any] = {
        "knobs": _without(old.get("knobs"), tried) | {f.knob.name: f.best for f in better},
        "gain": _without(old.get("gain"), tried) | {f.knob.name: round(f.gain, 3) for f in better},
        "date": time.strftime("%Y-%m-%d"),
    }
    if options.device == "cpu":
        entry["threads"] = options.threads
    try:
        _knobs.write(_knobs.path(), device, op, entry)
    except OSError as error:
        raise _unwritable(error) from None


def _without(values: Any, names: set[str]) -> dict[str, Any]:
    return {n: v for n, v in values.items() if n not in names} if isinstance(values, dict) else {}


def _cells(found: Found) -> tuple[str, ...]:
    if found.note:
        return (found.knob.name, str(found.knob.standard), str(found.best), "", found.note)
    gains = " ".join(f"{r:.2f}" for r in found.ratios)
    return (
        found.knob.name, str(found.knob.standard), str(found.best), f"{found.gain:.2f}x", gains,
    )  # fmt: skip


def _line(cells: tuple[str, ...]) -> str:
    name, standard, best, gain, rest = cells
    return f"{name:<40}{standard:>9}{best:>9}{gain:>8}  {rest}"
