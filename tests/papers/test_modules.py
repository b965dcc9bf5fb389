"""Everything in tokenmill.nn: examples run, and the modules page names each module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from literal import run_examples

from tokenmill import nn

PAGE = Path(__file__).resolve().parents[2] / "docs" / "modules.md"
MODULES = [n for n in nn.__all__ if hasattr(getattr(nn, n), "forward")]
WITH_EXAMPLE = [n for n in nn.__all__ if n in MODULES or ">>>" in (getattr(nn, n).__doc__ or "")]


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_example_runs(name):
    run_examples(getattr(nn, name))


@pytest.mark.skipif(not PAGE.exists(), reason="the documents are not beside the tests")
def test_the_page_names_every_module_once():
    rows = re.findall(r"^\| (`.*?`) \|", PAGE.read_text(), flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(MODULES)
