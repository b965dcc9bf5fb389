"""Runs cases, prints a row for each as it ends, and writes the results of this machine."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tokenmill import info
from tokenmill.version import __version__

from . import case as cases_module
from . import plot
from .case import Absent, Case, cases, geometric_mean
from .progress import progress
from .timing import copy_bandwidth, interleave, peak_flops

HEADER = ("case", "ms", "GFLOP/s", "% peak", "GB/s", "ratio to peers (their time / ours)")
WIDTHS = (58, 9, 8, 7, 6, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", help="operators to run (default: all)")
    parser.add_argument("--filter", default="", help="only cases whose title matches this regex")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1: see the docs)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case (default 3)")
    parser.add_argument("--json", type=Path, help="write results here as JSON")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw PNGs into this folder")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument(
        "--counters",
        action="store_true",
        help="count what the CUDA kernels do, on the PTX machine (development builds)",
    )


def run(options: argparse.Namespace) -> int:
    if options.counters:
        from . import counters

        return counters.run(options)
    cases_module.device = torch.device(options.device)
    chosen = [c for c in cases(options.ops) if re.search(options.filter, c.title)]
    if not chosen:
        print("tokenmill bench: no case matches", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{c.op}: {c.title}" for c in chosen))
        return 0
    machine = info.machine()
    gpu = options.device == "cuda"
    print(plot.label(machine, options.device, options.threads))
    units = 1 if gpu else options.threads
    peaks = {dtype: peak_flops(dtype, gpu) * units for dtype in {c.dtype for c in chosen}}
    for dtype, peak in sorted(peaks.items(), key=str):
        print(f"multiply-add peak for {str(dtype)[6:]}: {peak / 1e9:.1f} GFLOP/s")
    bandwidth = copy_bandwidth(gpu)
    print(f"copy bandwidth{'' if gpu else ' (one thread)'}: {bandwidth / 1e9:.1f} GB/s\n")
    print(_line(HEADER))
    rows = []
    with progress(len(chosen)) as advance:
        for case in chosen:
            rows.append(_measure(case, options, peaks[case.dtype], advance))
            print(_line(_cells(rows[-1])), flush=True)
    _summary(rows)
    results = {
        "machine": machine,
        "tokenmill": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "device": options.device,
        "threads": options.threads,
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(to_json(results))
        print(f"wrote {options.json}")
    if options.plot:
        for path in plot.draw(results, options.plot):
            print(f"wrote {path}")
    return 0


def to_json(results: dict[str, Any]) -> str:
    """A line for each row."""
    head = json.dumps(results | {"rows": []}, indent=1).removesuffix("[]\n}")
    return head + "[\n" + ",\n".join(map(json.dumps, results["rows"])) + "\n]}\n"


def _measure(case: Case, options: argparse.Namespace, peak: float, advance: Any) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    ours, builders = case.prepare()
    runs, absent = {"tokenmill": ours}, {}
    for name, build in builders.items():
        try:
            runs[name] = build()
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # a peer that fails is a fact about the peer
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    gpu = options.device == "cuda"
    timings = interleave(
        runs, threads=options.threads, seconds=options.seconds, tick=advance, gpu=gpu
    )
    advance(done=True)

    def figure(name: str) -> float:
        return timings[name].median if gpu or options.threads == 1 else timings[name].best

    seconds = figure("tokenmill")
    return {
        "op": case.op,
        "case": case.title,
        "dtype": str(case.dtype)[6:],
        **({} if case.length is None else {"length": case.length}),
        "seconds": seconds,
        "rounds": timings["tokenmill"].rounds,
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
            if name != "tokenmill"
        },
        "absent": absent,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
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
    names = dict.fromkeys(name for row in rows for name in row["peers"])
    for name in names:
        ratios = [row["peers"][name]["ratio"] for row in rows if name in row["peers"]]
        print(f"geometric mean against {name}: {geometric_mean(ratios):.2f}x ({len(ratios)} cases)")
