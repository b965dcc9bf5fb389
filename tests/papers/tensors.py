"""What tests of functions share: backends fast enough for papers, inputs, comparisons."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of

# Interpreters prove nothing here that the tests of the operators do not.
FAST = [
    b for b in backends("reference") if b not in ("triton", "emulated") or device_of(b) == "cuda"
]
each_backend = pytest.mark.parametrize("backend", FAST)


def draw(backend, *shapes, seed=0):
    """A tensor of each shape, N(0, 1), with a gradient to ask for."""
    g = torch.Generator().manual_seed(seed)
    device = device_of(backend)
    return [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance)


def same_gradients(got, want, leaves, tolerance=1e-4):
    """Of a random combination of the results, with respect to the leaves."""
    g = torch.Generator().manual_seed(1)
    cotangent = torch.randn(want.shape, generator=g).to(got)
    grads = [torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
