"""Packages that the tests of this folder compare tokenmill with. A missing package is skipped by
name, and the end of a run lists it (tests/shares.py)."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import pytest


def package(name: str) -> ModuleType:
    """The module; if the package is not installed, the tests of the calling file are skipped. An
    installed package that does not load is an error."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"not installed: {name}", allow_module_level=True)
    return importlib.import_module(name)
