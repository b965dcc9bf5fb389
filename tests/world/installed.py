"""Packages that the tests of this folder hold tokenmill to. What is missing is skipped by its name,
and the end of a run lists it (tests/shares.py)."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import pytest


def package(name: str) -> ModuleType:
    """The module; where the package is not installed, the tests of the calling file are skipped. A
    package that is there and does not load is an error."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"not installed: {name}", allow_module_level=True)
    return importlib.import_module(name)
