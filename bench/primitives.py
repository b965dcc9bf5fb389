"""Ceilings of this machine: `python -m tokenmill bench primitives`. Peak rates of its arithmetic
units, memories, launches and threads, each measured in isolation."""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

import torch

from tokenmill import _cli, _info
from tokenmill._version import __version__

from .gpu import CudaDevice
from .interval import median_interval
from .plot import label
from .primitives_cpu import probes as cpu_probes
from .primitives_cuda import Sizes
from .primitives_cuda import probes as cuda_probes
from .probe import Probe
from .progress import progress
from .report import primitive_cells
from .results import SCHEMA, Results, build_digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default cpu)"
    )
    parser.add_argument(
        "--seconds", type=_cli.seconds, default=0.3, help="time per primitive (default 0.3)"
    )
    parser.add_argument(
        "--filter", default="", metavar="REGEX", help="only primitives whose title matches"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write results as JSON, each as it is measured, for --primitives of bench; - writes "
        "them to stdout and the table to stderr",
    )
    parser.add_argument("--list", action="store_true", help="name the primitives and stop")


def run(options: argparse.Namespace) -> int:
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if options.json == "-" else stdout):
        return _run(options, stdout)


def _run(options: argparse.Namespace, stdout: TextIO) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        rule = "must be a device of this machine (cpu: there is no GPU)"
        raise _cli.UsageError(f"--device: {rule}; got 'cuda'")
    try:
        wanted = re.compile(options.filter)
    except re.error as error:
        rule = "must be a regular expression"
        raise _cli.UsageError(f"--filter: {rule}; got '{options.filter}' ({error})") from None
    probes = [probe for probe in _probes(options.device) if wanted.search(probe.title)]
    if not probes:
        raise _cli.UsageError(f"--filter: no primitive matches; got '{options.filter}'")
    if options.list:
        print("\n".join(probe.title for probe in probes))
        return 0
    results = Results(options.json, stdout)
    machine = _info.machine()
    print(f"{label(machine, options.device, None)}\n")
    results.begin(
        {
            "schema": SCHEMA,
            "kind": "primitives",
            "build": build_digest() if options.json else "",
            "machine": machine,
            "tokenmill": __version__,
            "date": time.strftime("%Y-%m-%d"),
            "device": options.device,
        }
    )
    with progress(len(probes), "measuring") as advance:
        for probe in probes:
            advance(start=probe.title)
            row = measured(probe, options.seconds)
            advance(done=True)
            results.add(row)
            print(line(row), flush=True)
    results.end()
    return 0


def _probes(device: str) -> Iterator[Probe]:
    if device == "cuda":
        return cuda_probes(CudaDevice(), "cuda", Sizes.of_this_device())
    return cpu_probes()


def measured(probe: Probe, seconds: float) -> dict[str, Any]:
    """Measures a probe. value is the maximum sample, as for a ceiling; the median and its interval
    show the spread."""
    row = {"primitive": probe.primitive, "title": probe.title, "unit": probe.unit, **probe.facts}
    try:
        samples = probe.measure(seconds)
    except Exception as error:
        return row | {"absent": _cli.one_line(error)}
    interval = median_interval(samples)
    return row | {
        "value": min(samples) if probe.unit == "s" else max(samples),
        "median": statistics.median(samples),
        "interval": [interval.low, interval.high],
        "coverage": round(interval.coverage, 4),
        "rounds": len(samples),
    }


def line(row: dict[str, Any]) -> str:
    cells = primitive_cells(row)
    said = cells[3] if "absent" in row else f"median in {cells[3]}"
    return f"{cells[0]:<52}{cells[1]:>10}  {cells[2]:<8} {said}"
