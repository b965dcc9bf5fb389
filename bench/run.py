"""Runs cases, prints a row for each as it ends, and writes the results of this machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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
from . import plot
from .case import Absent, Case, cases, geometric_mean
from .progress import progress
from .results import Results
from .timing import copy_bandwidth, interleave, peak_flops, use_threads

HEADER = ("case", "ms", "GFLOP/s", "% peak", "GB/s", "ratio to peers (their time / ours)")
WIDTHS = (58, 9, 8, 7, 6, 0)
OURS = "tokenmill"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops", nargs="*", type=_cli.operator, help="operators to run (default: all)"
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
    parser.add_argument(
        "--seconds", type=_cli.seconds, default=3.0, help="time per case (default 3)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write results as JSON, each row as it is measured; - writes them to stdout and the "
        "table to stderr",
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
    """Exit status: 0, or 1 if a case failed; the others are measured all the same."""
    measure = _run
    if options.counters:
        from . import counters

        measure = counters.run
    elif options.launches:
        from .counters import launches

        measure = launches.run
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if options.json == "-" else stdout):
        return measure(options, stdout)


def _run(options: argparse.Namespace, stdout: TextIO) -> int:
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        rule = "must be a device of this machine (cpu: there is no GPU)"
        raise _cli.UsageError(f"--device: {rule}; got 'cuda'")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise _cli.UsageError("--plot: needs matplotlib (pip install tokenmill[bench])")
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
    results = Results(options.json, stdout)
    machine = _info.machine()
    print(plot.label(machine, options.device, options.threads))
    units = 1 if gpu else options.threads
    peaks = {dtype: peak_flops(dtype, gpu) * units for dtype in {c.dtype for c in chosen}}
    for dtype, peak in sorted(peaks.items(), key=str):
        print(f"multiply-add peak for {str(dtype)[6:]}: {peak / 1e9:.1f} GFLOP/s")
    bandwidth = copy_bandwidth(gpu)
    print(f"copy bandwidth{'' if gpu else ' (one thread)'}: {bandwidth / 1e9:.1f} GB/s\n")
    print(_line(HEADER))
    results.begin(
        {
            "machine": machine,
            "tokenmill": __version__,
            "date": time.strftime("%Y-%m-%d"),
            "device": options.device,
            "threads": options.threads,
            "copy_bandwidth": bandwidth,
        }
    )
    for row in failed:
        results.add(row)
        print(_line(_cells(row)), flush=True)
    with progress(len(chosen)) as advance:
        for case in chosen:
            row = {"op": case.op, "case": case.title, "dtype": str(case.dtype)[6:]}
            if case.length is not None:
                row["length"] = case.length
            try:
                row |= _measure(case, options, peaks[case.dtype], advance)
            except Exception as error:
                row["error"] = _cli.one_line(error)
            advance(done=True)
            results.add(row)
            print(_line(_cells(row)), flush=True)
    _summary(results.rows)
    results.end()
    if options.plot:
        for path in plot.draw(results.document, options.plot):
            print(f"wrote {path}")
    return 1 if any("error" in row for row in results.rows) else 0


def _cases(options: argparse.Namespace) -> tuple[list[Case], list[dict[str, Any]]]:
    """The cases asked for, and a row for each operator whose cases cannot be made."""
    chosen, failed = [], []
    for op in dict.fromkeys(options.ops or registry.ops()):
        try:
            chosen += [c for c in cases([op]) if options.filter.search(c.title)]
        except Exception as error:
            failed.append({"op": op, "case": f"cases of {op}", "error": _cli.one_line(error)})
    return chosen, failed


def _measure(case: Case, options: argparse.Namespace, peak: float, advance: Any) -> dict[str, Any]:
    gpu = options.device == "cuda"
    absent = {}

    def leave_out(name: str, error: Exception) -> None:
        if name == OURS:
            raise error
        # A peer that fails is a fact about the peer.
        absent[name] = str(error) if isinstance(error, Absent) else _cli.one_line(error)[:100]

    with use_threads(options.threads):
        ours, builders = case.prepare()
        runs = {OURS: ours}
        for name, build in builders.items():
            try:
                runs[name] = build()
            except Exception as error:
                leave_out(name, error)
        timings = interleave(
            runs,
            threads=options.threads,
            seconds=options.seconds,
            tick=advance,
            on_error=leave_out,
            gpu=gpu,
        )

    def figure(name: str) -> float:
        return timings[name].median if gpu or options.threads == 1 else timings[name].best

    seconds = figure(OURS)
    return {
        "seconds": seconds,
        "rounds": timings[OURS].rounds,
        "flops": case.work / seconds,
        "peak_share": case.work / seconds / peak,
        "bytes_per_second": case.moved / seconds,
        "peers": {
            name: {
                "seconds": figure(name),
                "flops": case.work / figure(name),
                "ratio": figure(name) / seconds,
            }
            for name in timings
            if name != OURS
        },
        "absent": absent,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return (row["case"], "", "", "", "", f"failed: {row['error']}")
    peers = [f"{name} {p['ratio']:.2f}x" for name, p in row["peers"].items()]
    peers += [f"{name} absent ({why})" for name, why in row["absent"].items()]
    return (
        row["case"],
        f"{row['seconds'] * 1e3:.2f}",
        f"{row['flops'] / 1e9:.1f}",
        f"{row['peak_share']:.0%}",
        f"{row['bytes_per_second'] / 1e9:.1f}",
        ", ".join(peers),
    )


def _line(cells: tuple[str, ...]) -> str:
    first, *numbers, last = cells
    middle = "".join(f"{n:>{w}}" for n, w in zip(numbers, WIDTHS[1:], strict=False))
    return f"{first:<{WIDTHS[0]}}{middle}  {last}"


def _summary(rows: list[dict[str, Any]]) -> None:
    measured = [row for row in rows if "error" not in row]
    names = dict.fromkeys(name for row in measured for name in row["peers"])
    for name in names:
        ratios = [row["peers"][name]["ratio"] for row in measured if name in row["peers"]]
        print(f"geometric mean against {name}: {geometric_mean(ratios):.2f}x ({len(ratios)} cases)")
    if len(measured) < len(rows):
        print(f"{len(rows) - len(measured)} of {len(rows)} cases failed")
