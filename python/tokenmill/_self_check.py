"""python -m tokenmill check: every operator on this machine against the float64 oracle."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import _cli, _explain, _info, registry, testing
from ._call import choose
from ._version import __version__
from .registry import OpSpec, Sample

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops", nargs="*", type=_cli.operator, help="operators to check (default: all)"
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=choose.ALL_BACKENDS,
        help="backend to check, repeatable (default: all of this machine but interpreters)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="dtype to check, repeatable (default: all three)",
    )
    parser.add_argument(
        "--all-isas",
        action="store_true",
        help="backend cpu with every instruction set of this machine, not only the best",
    )
    parser.add_argument("--verbose", action="store_true", help="a line for every tensor")
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON")
    parser.add_argument(
        "--invariance",
        action="store_true",
        help="instead, whether a request has the same bits in any batch where docs/numerics.md "
        "says so (backend cpu)",
    )


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 if every tensor is within its error budget, 1 if one is not, a call fails or
    nothing could be checked.
    """
    from .bench.progress import progress

    if options.invariance:
        return _run_invariance(options)
    if options.json:
        _cli.writable_folder("--json", Path(options.json).parent)
    ops = list(dict.fromkeys(options.ops)) or list(registry.ops())
    dtypes = list(dict.fromkeys(options.dtype or DTYPES))
    places = _places(options)
    rows: list[Row] = []
    with progress(len(ops), "checking") as advance:
        for op in ops:
            found = _check(registry.get(op), places, dtypes, options.verbose)
            advance(done=True)
            for row in found:
                print(row.line())
                for problem in row.problems:
                    print(f"    {problem}")
            sys.stdout.flush()
            rows += found
    print()
    _summary(rows)
    if options.json:
        _write(Path(options.json), rows)
    return 0 if all(row.ok for row in rows) and any(row.compared for row in rows) else 1


def _run_invariance(options: argparse.Namespace) -> int:
    """Exit status: 1 if a bit differs where the table of docs/numerics.md promises otherwise."""
    from ._promise.table import COLUMNS, Draw, differences, promise

    if options.json or options.verbose or set(options.backend or ["cpu"]) != {"cpu"}:
        rule = "must go without --json, --verbose and backends other than cpu"
        raise _cli.UsageError(f"--invariance: {rule}")
    options.backend = ["cpu"]
    places, wrong = _places(options), 0
    print(f"{'':<44}" + "".join(f"{column:<11}" for column in COLUMNS))
    for op, row in promise().items():
        for place in places if not options.ops or op in options.ops else ():
            problems: dict[str, str] = {}
            for dtype in dict.fromkeys(options.dtype or DTYPES):
                with place.chosen():
                    found = differences(row, Draw(DTYPES[dtype]))
                problems |= {column: f"{dtype}: {text}" for column, text in found.items()}
            said = {c: cell.word for c, cell in row.items()}
            said |= dict.fromkeys(problems, "DIFFERS")
            print(f"{place!s:<18}{op:<26}" + "".join(f"{said.get(c, ''):<11}" for c in COLUMNS))
            for column, problem in problems.items():
                print(f"    {column}: {problem}")
            sys.stdout.flush()
            wrong += len(problems)
    return 1 if wrong else 0


@dataclass(frozen=True)
class Place:
    """Device and instruction set on which operators run."""

    backend: str
    isa: str | None = None  # None: the current one

    def __str__(self) -> str:
        return f"{self.backend} {self.isa}" if self.isa else self.backend

    @property
    def device(self) -> str:
        gpu = self.backend in ("cuda", "triton") and torch.cuda.is_available()
        return "cuda" if gpu else "cpu"

    def chosen(self) -> contextlib.AbstractContextManager[None]:
        return testing.cpu_isa(self.isa) if self.isa else contextlib.nullcontext()


@dataclass
class Row:
    """Findings on one operator in one place."""

    place: Place
    op: str
    absent: bool = False  # whether it has no kernel there
    compared: int = 0  # number of tensors compared
    wrong: int = 0  # number of tensors over budget
    failed: int = 0  # number of failed calls
    worst: float = 0.0  # maximum error as a fraction of its budget
    problems: list[str] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)  # worst, per dtype
    # samples left out, and why kernels do not support them
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not (self.wrong or self.failed)

    @property
    def verdict(self) -> str:
        if self.absent:
            return "absent"
        return "FAILED" if self.failed else "WRONG" if self.wrong else "ok"

    def line(self) -> str:
        head = f"{self.place!s:<18}{self.op:<26}{self.verdict:<8}"
        if self.absent:
            return f"{head}no kernel in this build"
        return f"{head}largest share of the budget {self.worst:.0%}"


def _places(options: argparse.Namespace) -> list[Place]:
    states = _explain.backends()
    usable = [b for b, s in states.items() if s.startswith(("available", "interpreter"))]
    for backend in options.backend or []:
        if backend not in usable:
            why = states.get(backend, "not in this build")
            rule = f"must be a backend of this machine ({', '.join(usable)})"
            raise _cli.UsageError(f"--backend: {rule}; got '{backend}': {why}")
    chosen = options.backend or [b for b in usable if not states[b].startswith("interpreter")]
    if options.all_isas and "cpu" not in chosen:
        raise _cli.UsageError("--all-isas: must go with backend cpu; got " + ", ".join(chosen))
    places = []
    for backend in dict.fromkeys(chosen):
        every = backend == "cpu" and options.all_isas
        places += [Place(backend, isa) for isa in (testing.cpu_isas() if every else [None])]
    return places


def _check(spec: OpSpec, places: list[Place], dtypes: list[str], verbose: bool) -> list[Row]:
    rows = [
        Row(place, spec.name, absent=_explain.kernels(spec, place.backend) == "-")
        for place in places
    ]
    for dtype in dtypes:
        for sample in spec.samples:
            for row in rows:  # innermost loop, so that the oracle runs once for all rows
                if row.absent:
                    continue
                if why := _explain.missing(spec, sample, row.place.backend):
                    row.left_out[sample.name] = "; ".join(why)
                else:
                    _compare(row, spec, sample, dtype, verbose)
    return rows


def _compare(row: Row, spec: OpSpec, sample: Sample, dtype: str, verbose: bool) -> None:
    place, call = row.place, f"{sample.name}, {dtype}"
    try:
        with place.chosen():
            found = testing.compare(
                spec, sample, place.backend, DTYPES[dtype], device=place.device, draws=4
            )
    except Exception as error:  # a failing call does not stop the others
        row.failed += 1
        row.problems.append(f"{call}: {_cli.one_line(error)}")
        return
    row.compared += len(found)
    row.shares[dtype] = max([row.shares.get(dtype, 0.0), *(c.share for c in found)])
    row.worst = max(row.worst, row.shares[dtype])
    for c in found:
        if verbose:
            print(f"    {place}, {call}: {c.name} {c.error:.2e} of {c.allowed:.2e}")
        if not c.ok:
            row.wrong += 1
            row.problems.append(f"{call}: {c.name} error {c.error:.3g}, allowed {c.allowed:.3g}")


def _summary(rows: list[Row]) -> None:
    headings = ("ok", "WRONG", "FAILED", "absent")
    print(f"{'operators':<18}" + "".join(f"{h:>8}" for h in headings) + "   tensors in budget")
    for place in dict.fromkeys(row.place for row in rows):
        here = [row for row in rows if row.place == place]
        verdicts = [row.verdict for row in here]
        counts = "".join(f"{verdicts.count(h):>8}" for h in headings)
        compared, wrong = sum(row.compared for row in here), sum(row.wrong for row in here)
        print(f"{place!s:<18}{counts}   {compared - wrong} of {compared}")


def _write(path: Path, rows: list[Row]) -> None:
    """Writes the file that `tokenmill report` reads."""
    places = dict.fromkeys(row.place for row in rows)
    document: dict[str, Any] = {
        "machine": _info.machine(),
        "tokenmill": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "backends": _explain.backends(),
        "places": [str(place) for place in places],
        "checks": [
            {
                "op": row.op,
                "place": str(row.place),
                "verdict": row.verdict,
                "tensors": row.compared,
                # None: an error where none is allowed, or NaN
                "shares": {k: v if math.isfinite(v) else None for k, v in row.shares.items()},
                "problems": row.problems,
                "left_out": row.left_out,
            }
            for row in rows
        ],
    }
    _cli.write_json("--json", path, document)
