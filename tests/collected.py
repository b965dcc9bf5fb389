"""Backends that test files take as a parameter, as pytest collects them."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tokenmill._call.choose import ALL_BACKENDS

ROOT = Path(__file__).resolve().parent.parent


def backends_of(session, paths: Iterable[Path]) -> dict[Path, set[str]]:
    """Backends by file. Files outside the session are collected in a separate process."""
    names = [(item.path, item.nodeid) for item in session.items]
    missing = sorted({str(path) for path in paths} - {str(path) for path, _ in names})
    found = defaultdict(set)
    for path, name in (*names, *_collect(tuple(missing))):
        found[path] |= set(re.findall(r"\w+", name.partition("[")[2])) & set(ALL_BACKENDS)
    return found


@functools.cache
def _collect(paths: tuple[str, ...]) -> list[tuple[Path, str]]:
    if not paths:
        return []
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *paths]
    lines = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    return [(ROOT / line.partition("::")[0], line) for line in lines if "::" in line]
