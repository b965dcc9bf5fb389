"""Runs cases, prints each row as it ends, and writes the results of this machine."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from tokenmill import _cli, _info, registry
from tokenmill._version import __version__

from . import case as cases_module
from . import ceilings, packages, plot
from .case import RECIPES, Case, best_peer, cases, geometric_mean, ratios_of
from .ceilings import Ceilings
from .gpu import CudaDevice
from .lines import Lines
from .measure import Bench, Budget, few, key, measure, row_of, shares
from .progress import progress
from .results import SCHEMA, Results, build_digest, earlier, load
from .sensors import Sensors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops",
        nargs="*",
        type=lambda name: name if name in RECIPES else _cli.operator(name),
        help=f"operators to run, or {', '.join(RECIPES)} (default: all)",
    )
    parser.add_argument(
        "--filter",
        type=_pattern,
        default=re.compile(""),
        metavar="REGEX",
        help="only cases whose title matches",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default cpu)"
    )
    parser.add_argument(
        "--threads",
        type=_cli.integer(1, os.cpu_count()),
        default=1,
        metavar="N",
        help="threads, up to the number of cores (default 1: see the docs)",
    )
    spent = parser.add_mutually_exclusive_group()
    spent.add_argument(
        "--seconds", type=_cli.seconds, default=3.0, help="time per case (default 3)"
    )
    spent.add_argument(
        "--time-budget",
        type=_cli.duration,
        metavar="TIME",
        help="time for all cases (90s, 10m, 1h30m), which share it",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write results as JSON, each row as it is measured; - writes them to stdout and the "
        "table to stderr",
    )
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="skip the rows of this file, which the same build measured with the same options, and "
        "add those that are missing (to --json, if it is given)",
    )
    parser.add_argument(
        "--primitives",
        metavar="FILE",
        help="take the ceilings from what bench primitives --json wrote on this machine",
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw PNGs into this folder")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument(
        "--counters",
        action="store_true",
        help="count what the CUDA kernels do, on the PTX machine (development builds)",
    )
    parser.add_argument(
        "--launches",
        action="store_true",
        help="count the launches of a request and their blocks, likewise",
    )


def _pattern(value: str) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except re.error as error:
        rule = "must be a regular expression"
        raise argparse.ArgumentTypeError(f"{rule}; got '{value}' ({error})") from None


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0, or 1 if a case failed; the others are still measured."""
    measure_all = _run
    if options.counters or options.launches:
        from . import counters
        from .counters import launches

        for name in ("resume", "primitives", "time_budget"):
            if getattr(options, name):
                flag = name.replace("_", "-")
                raise _cli.UsageError(f"--{flag}: is for times; leave it out with counts")
        measure_all = counters.run if options.counters else launches.run
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if options.json == "-" else stdout):
        return measure_all(options, stdout)


def _run(options: argparse.Namespace, stdout: TextIO) -> int:
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        rule = "must be a device of this machine (cpu: there is no GPU)"
        raise _cli.UsageError(f"--device: {rule}; got 'cuda'")
    if options.plot:
        _cli.check_plot("--plot", "bench")
    cases_module.device = torch.device(options.device)
    chosen, failed = _cases(options)
    if not chosen and not failed:
        raise _cli.UsageError(f"--filter: no case matches; got '{options.filter.pattern}'")
    if options.list:
        for case in chosen:
            print(f"{case.op}: {case.title}")
        for row in failed:
            print(f"{row['op']}: {row['error']}", file=sys.stderr)
        return 1 if failed else 0
    if options.plot:
        _cli.writable_folder("--plot", options.plot)
    if options.resume == "-":
        raise _cli.UsageError("--resume: must be a file; got '-'")
    head = _head(options)
    document, kept = earlier(options.resume, head) if options.resume else ({}, [])
    target, argument = (options.json, "--json") if options.json else (options.resume, "--resume")
    results = Results(target, stdout, argument)
    dtypes = sorted({str(case.dtype)[6:] for case in chosen} | {row["dtype"] for row in kept})
    limits = _ceilings(options, document, dtypes, head["machine"])
    if options.primitives:  # kept rows were compared with other ceilings
        kept = [row | shares(row, row["dtype"], limits) for row in kept]
    sensors = Sensors() if gpu else None
    bench = Bench(options.threads, limits, CudaDevice() if gpu else None, sensors)
    head |= {
        "statistic": bench.statistic,
        "ceilings": {"flops": limits.flops, "from": limits.source},
        "copy_bandwidth": limits.memory,
        "primitives": document.get("primitives", []),
        "peers": packages.status(options.device),
        "sensors": "none" if sensors is None else sensors.absent or "NVML",
    }
    if options.primitives:
        head["primitives"] = _primitives(options.primitives, options.device, head["machine"])
    _print_head(head, gpu)
    done = {key(row) for row in kept}
    wanted = [case for case in chosen if key(row_of(case)) not in done]
    if options.resume:
        print(f"--resume: {len(chosen) - len(wanted)} of {len(chosen)} cases are measured already")
    lines = Lines(gpu)
    print(lines.header(), flush=True)
    try:
        results.begin(head, [*kept, *failed])
        for row in failed:
            print(lines.line(row), flush=True)
        left_out = _measure_all(options, wanted, bench, results, lines)
    except KeyboardInterrupt:
        results.end()
        raise
    _summary(results.rows, left_out, options)
    results.end()
    if options.plot:
        for path in plot.draw(results.document, options.plot):
            print(f"wrote {path}")
    return 1 if any("error" in row for row in results.rows) else 0


def _measure_all(
    options: argparse.Namespace, wanted: list[Case], bench: Bench, results: Results, lines: Lines
) -> list[Case]:
    """Adds a row per case, and returns the cases for which no time was left."""
    budget = Budget(options.seconds, options.time_budget, len(wanted))
    left_out = []
    with progress(len(wanted)) as advance:
        for case in wanted:
            advance(start=f"{case.op}, {case.title}")
            seconds = budget.next()
            if seconds is None:
                left_out.append(case)
                continue
            row = row_of(case)
            try:
                row |= measure(case, bench, seconds, budget.limited, advance)
            except Exception as error:
                row["error"] = _cli.one_line(error)
            advance(done=True)
            results.add(row)
            print(lines.line(row), flush=True)
    return left_out


def _head(options: argparse.Namespace) -> dict[str, Any]:
    """Describes the measurement before it starts."""
    return {
        "schema": SCHEMA,
        "build": build_digest() if options.json or options.resume else "",
        "machine": _info.machine(),
        "tokenmill": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "device": options.device,
        "threads": options.threads,
        "options": {"seconds": options.seconds, "time_budget": options.time_budget},
    }


def _ceilings(
    options: argparse.Namespace,
    document: dict[str, Any],
    names: list[str],
    machine: dict[str, str],
) -> Ceilings:
    """Ceilings from --primitives, from the resumed run, or measured now."""
    gpu, threads = options.device == "cuda", options.threads
    dtypes = [getattr(torch, name) for name in names]
    rows = document.get("primitives", [])
    if options.primitives:
        rows = _primitives(options.primitives, options.device, machine)
    if rows:
        try:
            found = ceilings.from_primitives(rows, options.device, threads)
        except ValueError as error:
            rule = "must have the ceilings of this device and number of threads"
            name = options.primitives or options.resume
            raise _cli.UsageError(f"--primitives: {rule}; got '{name}' ({error})") from None
    elif document:
        there = document["ceilings"]
        sizes = ((math.inf, document["copy_bandwidth"]),)
        found = Ceilings(there["flops"], sizes, there["from"])
    else:
        return ceilings.measured(dtypes, gpu, threads)
    return ceilings.with_dtypes(found, dtypes, gpu, threads)


def _primitives(path: str, device: str, machine: dict[str, str]) -> list[dict[str, Any]]:
    document = load(path, "--primitives")
    made = document.get("kind"), document.get("device"), document["machine"]
    if made != ("primitives", device, machine):
        rule = "must be what bench primitives --json wrote on this machine for this device"
        raise _cli.UsageError(f"--primitives: {rule}; got '{path}'")
    rows: list[dict[str, Any]] = document["rows"]
    return rows


def _print_head(head: dict[str, Any], gpu: bool) -> None:
    print(plot.label(head["machine"], head["device"], head["threads"]))
    source = head["ceilings"]["from"]
    for dtype, peak in sorted(head["ceilings"]["flops"].items()):
        print(f"multiply-add peak for {dtype}: {peak / 1e9:.1f} GFLOP/s ({source})")
    print(f"memory bandwidth: {head['copy_bandwidth'] / 1e9:.1f} GB/s ({source})")
    if gpu:
        print(f"clocks and power: {head['sensors']}")
    print("peers: " + ", ".join(f"{name} {state}" for name, state in head["peers"].items()))
    print()


def _cases(options: argparse.Namespace) -> tuple[list[Case], list[dict[str, Any]]]:
    """Requested cases, and a row for each operator whose cases cannot be created."""
    chosen, failed = [], []
    for op in dict.fromkeys(options.ops or (*registry.ops(), *RECIPES)):
        try:
            chosen += [c for c in cases([op]) if options.filter.search(c.title)]
        except Exception as error:
            failed.append({"op": op, "case": f"cases of {op}", "error": _cli.one_line(error)})
    return chosen, failed


def _summary(rows: list[dict[str, Any]], left_out: list[Case], options: argparse.Namespace) -> None:
    measured = [row for row in rows if "error" not in row]
    names = dict.fromkeys(name for row in measured for name in row["peers"])
    best = [r[name] for r in map(ratios_of, measured) if (name := best_peer(r))]
    if best:
        print(
            f"geometric mean against the best peer: {geometric_mean(best):.2f}x ({len(best)} cases)"
        )
    for name in names:
        ratios = [row["peers"][name]["ratio"] for row in measured if name in row["peers"]]
        print(f"geometric mean against {name}: {geometric_mean(ratios):.2f}x ({len(ratios)} cases)")
    if len(measured) < len(rows):
        print(f"{len(rows) - len(measured)} of {len(rows)} cases failed")
    for row in filter(few, measured):
        print(f"few repetitions for lack of time: {row['op']}, {row['case']}: {row['rounds']}")
    for case in left_out:
        print(f"not measured for lack of time: {case.op}, {case.title}")
    if left_out and (name := options.json or options.resume) and name != "-":
        print(f"--resume {name} goes on with them")
