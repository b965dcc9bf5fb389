"""What `ci/test --quick` leaves to `ci/test`: most mutants, and other people's larger programs."""

from __future__ import annotations

import os

import pytest

FULL = os.environ.get("PTXVM_TEST_QUICK") != "1"
full_only = pytest.mark.skipif(not FULL, reason="ci/test without --quick runs it")


def daily(*cases: str, full: tuple[str, ...]) -> tuple[str, ...]:
    """What is always tested; without --quick, `full` too."""
    return (*cases, *full) if FULL else cases
