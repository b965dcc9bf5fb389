"""The examples in docstrings, each in a group of one rank."""

from __future__ import annotations

import doctest
import inspect

import pytest

import tokenmill.distributed as tmd

FUNCTIONS = [f for name in tmd.__all__ if inspect.isfunction(f := getattr(tmd, name))]
WITHOUT = {"register_sharding"}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_examples_run(function):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    found = finder.find(function, function.__name__, globs={})
    assert any(test.examples for test in found) or function.__name__ in WITHOUT
    for test in found:
        assert runner.run(test).failed == 0
