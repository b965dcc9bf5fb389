"""Backend of a call if a build lacks a kernel, and the messages."""

from __future__ import annotations

import warnings

import pytest
import torch

import tokenmill as tm
from tokenmill import registry
from tokenmill._call import operator, run


@pytest.fixture
def without_kernel(monkeypatch):
    """linear_attention as in a build that contains only other operators."""
    op = registry.get("linear_attention").forward
    monkeypatch.setattr(operator, "native_keys", operator.native_keys - {(op.name, "CPU")})
    monkeypatch.setitem(vars(op), "short", None)
    monkeypatch.setattr(run, "_warned", set())


def test_a_kernel_that_the_build_left_out_is_missed_aloud(without_kernel):
    x = torch.randn(1, 4, 2, 8)
    with pytest.warns(UserWarning, match="linear_attention: this build has no native CPU kernel"):
        tm.linear_attention(x, x, x)
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        tm.linear_attention(x, x, x)
    assert "no native CPU kernel in this build" in str(tm.explain("linear_attention", x, x, x))


def test_a_reference_that_was_asked_for_is_silent(without_kernel, monkeypatch):
    x = torch.randn(1, 4, 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tm.linear_attention(x, x, x, backend="reference")
        tm.linear_attention(*[x.double()] * 3)
        monkeypatch.setenv("TOKENMILL_BACKEND", "reference")
        tm.linear_attention(x, x, x)
