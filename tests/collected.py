"""The backends that the tests of a file have as a parameter, as pytest collects them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenmill._dispatch import ALL_BACKENDS


def backends_of(session, paths: Iterable[Path]) -> set[str]:
    """Files that are not part of this session are collected in a process of their own."""
    paths = list(paths)
    names = [item.nodeid for item in session.items if item.path in paths]
    missing = [str(path) for path in paths if path not in {item.path for item in session.items}]
    if missing:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *missing]
        names += subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    words = {word for name in names for word in re.findall(r"\w+", name.partition("[")[2])}
    return words & set(ALL_BACKENDS)
