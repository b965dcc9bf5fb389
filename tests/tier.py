"""What `ci/test` leaves to `ci/test --full`: before a release, and where kernels changed; and what
`ci/test --quick` leaves to both."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

FULL = os.environ.get("TOKENMILL_TEST_FULL") == "1"
QUICK = os.environ.get("TOKENMILL_TEST_QUICK") == "1"
full_only = pytest.mark.skipif(not FULL, reason="ci/test --full runs it")


def examples(count: int) -> settings:
    """Hypothesis draws so many examples, with --full ten times as many, with --quick a third."""
    return settings(max_examples=count * 10 if FULL else -(-count // 3) if QUICK else count)


def daily(*cases: str, full: tuple[str, ...]) -> tuple[str, ...]:
    """What is tested every day; with --full, `full` too."""
    return (*cases, *full) if FULL else cases
