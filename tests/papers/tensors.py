"""Shared code of the paper tests: backends that are fast enough, inputs, comparisons."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of, in_each_dtype
from torch.utils._python_dispatch import TorchDispatchMode

from tokenmill.testing import assert_accurate

# Triton's interpreter takes minutes for whole models; it runs the tests of the operators.
FAST = [b for b in backends("reference") if b != "triton" or device_of(b) == "cuda"]
each_backend = pytest.mark.parametrize("backend", FAST)
KERNELS = backends("reference")
every_backend = pytest.mark.parametrize("backend", KERNELS)
in_each_16_bits = pytest.mark.parametrize(
    ("dtype", "backend"),
    in_each_dtype([torch.bfloat16, torch.float16], [(b,) for b in KERNELS]),
)


def draw(backend, *shapes, seed=0, dtype=torch.float32):
    """A tensor of each shape, N(0, 1), that requires a gradient."""
    g = torch.Generator().manual_seed(seed)
    tensors = (torch.randn(shape, generator=g) for shape in shapes)
    return [t.to(device_of(backend), dtype).requires_grad_() for t in tensors]


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance)


def same_gradients(got, want, leaves, tolerance=1e-4):
    """Compares gradients of a random combination of the results, with respect to the leaves."""
    g = torch.Generator().manual_seed(1)
    cotangent = torch.randn(want.shape, generator=g).to(got)
    grads = [torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_keeps_budget(function, literal, inputs):
    """Asserts that results and gradients of function keep the error budget in the dtype of the
    inputs, measured by `literal` in float64 and in that dtype."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, plain, exact = function(*inputs), literal(*inputs), literal(*wide)
    assert_accurate(out, exact, plain)
    weight = torch.randn_like(out)
    found, rounded = (torch.autograd.grad(y, inputs, weight) for y in (out, plain))
    oracle = torch.autograd.grad(exact, wide, weight.double())
    for a, b, c in zip(found, oracle, rounded, strict=True):
        assert_accurate(a, b, c, gradient=True)


class Largest(TorchDispatchMode):
    """Records the maximum number of elements of a result."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result
