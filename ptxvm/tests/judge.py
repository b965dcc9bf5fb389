"""Runs programs with changed PTX and reads the machine's verdict."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from machine import LIBRARY

# Reports of a broken rule, a deadlock or a hang; not of PTX that the machine refuses.
REPORT = re.compile(r"\(block \([\d, ]+\), thread \d|: deadlock in block|: no block finished")
FAULTS = (710, 719)  # cudaErrorAssert, cudaErrorLaunchFailure
SECONDS = 300


def run_program(
    program: Path, options: Mapping[str, object], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program with machine options. The watchdog must end hangs long before the timeout."""
    environment = os.environ | {f"PTXVM_{name.upper()}": str(x) for name, x in options.items()}
    environment["LD_LIBRARY_PATH"] = str(LIBRARY.parent)
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, timeout=SECONDS
    )


def report_of(done: subprocess.CompletedProcess[str]) -> str:
    """The report that ended a program, "" if none did. Any other failure is an error."""
    if done.returncode == 0:
        return ""
    assert done.returncode == 1 and REPORT.search(done.stderr), (done.returncode, done.stderr)
    return done.stderr.splitlines()[0]
