"""Tests that `ci/test --quick` leaves to `ci/test`: most mutants, and larger third-party
programs."""

from __future__ import annotations

import os

import pytest

FULL = os.environ.get("PTXVM_TEST_QUICK") != "1"
full_only = pytest.mark.skipif(not FULL, reason="ci/test without --quick runs it")


def daily(*cases: str, full: tuple[str, ...]) -> tuple[str, ...]:
    """Cases that are always tested, plus `full` without --quick."""
    return (*cases, *full) if FULL else cases
