"""Test tiers: `ci/test --full` runs before a release and after kernel changes, and covers more than
`ci/test`; `ci/test --quick` covers less."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

FULL = os.environ.get("TOKENMILL_TEST_FULL") == "1"
QUICK = os.environ.get("TOKENMILL_TEST_QUICK") == "1"
full_only = pytest.mark.skipif(not FULL, reason="ci/test --full runs it")


def examples(count: int) -> settings:
    """Number of Hypothesis examples: ten times as many with --full, a third with --quick."""
    return settings(max_examples=count * 10 if FULL else -(-count // 3) if QUICK else count)


def daily(*cases: str, full: tuple[str, ...]) -> tuple[str, ...]:
    """Cases that are tested every day; with --full, `full` too."""
    return (*cases, *full) if FULL else cases
