"""A missing package is skipped by name, and the end of the run reports it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from installed import package
from shares import not_installed


def test_a_missing_package_is_named():
    with pytest.raises(pytest.skip.Exception, match=r"^not installed: no_such_package$"):
        package("no_such_package")
    assert package("pytest") is pytest


def test_the_end_of_a_run_lists_them_by_folder():
    def skipped(node, reason):
        return SimpleNamespace(nodeid=node, longrepr=("file.py", 1, reason))

    reports = [
        skipped("tests/world/test_b.py", "Skipped: not installed: b"),
        skipped("tests/world/test_a.py::test_x[1]", "Skipped: not installed: a with op"),
        skipped("tests/world/test_b.py", "Skipped: not installed: b"),
        skipped("tests/test_c.py::test_y", "Skipped: ci/test --full runs it"),
    ]
    assert not_installed(reports) == {"tests/world": ["a with op", "b"]}
