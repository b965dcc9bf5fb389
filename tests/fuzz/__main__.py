"""The command `python tests/fuzz`, for the tokenmill that is installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of the package fuzz

from fuzz import runner  # noqa: E402
from tokenmill import _cli  # noqa: E402


def main() -> int:
    """Exit status: 0, 1 if a call is wrong, 2 if the command line is."""
    options = _parser().parse_args()
    wrong = 0
    for backend in options.backend or ["cpu"]:
        report = runner.fuzz(
            options.calls,
            backend=backend,
            seed=options.seed,
            first=options.first,
            found=lambda finding: print(finding, flush=True),
        )
        wrong += len(report.findings)
        counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(report.counts.items()))
        print(f"{backend}: {counts or 'no calls'}", flush=True)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=runner.PROGRAM,
        description="Calls with changed arguments of everything that can be called, on the CPU or "
        "the PTX machine. None may crash, hang, return memory that nobody wrote, or raise an error "
        "that does not name argument, rule and value.",
    )
    parser.add_argument("calls", type=_cli.integer(0), help="number of calls on each backend")
    parser.add_argument("--seed", type=_cli.integer(0), default=0, help="of the calls (default: 0)")
    parser.add_argument(
        "--first", type=_cli.integer(0), default=0, help="number of the first call (default: 0)"
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=runner.BACKENDS,
        help="backend of the calls, repeatable (default: cpu)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
