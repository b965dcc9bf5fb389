"""The same cases for pytest-benchmark: `pytest bench --benchmark-group-by=group`."""

from __future__ import annotations

import pytest
import torch

from tokenmill.bench.case import Absent, cases

CASES = list(cases())


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.title)
def test_tokenmill(case, benchmark):
    benchmark.group = case.title
    ours, _ = case.prepare()
    benchmark(ours)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.title)
def test_peers(case, benchmark):
    benchmark.group = case.title
    _, builders = case.prepare()
    name, build = next(iter(builders.items()))
    benchmark.name = name
    try:
        run = build()
    except Absent as reason:
        pytest.skip(str(reason))
    benchmark(run)
