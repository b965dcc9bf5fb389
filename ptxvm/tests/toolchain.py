"""Locates nvcc and the CUTLASS headers, for tests that compile programs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cutlass_include() -> Path | None:
    """Include folder of $CUTLASS, or of the installed package nvidia-cutlass."""
    package = importlib.util.find_spec("cutlass_library")
    roots = [Path(os.environ["CUTLASS"])] if "CUTLASS" in os.environ else []
    if package and package.origin:
        roots.append(Path(package.origin).parent / "source")
    return next((r / "include" for r in roots if (r / "include" / "cute").is_dir()), None)
