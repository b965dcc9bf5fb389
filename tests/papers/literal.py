"""Comparison of a module with a literal reading of its paper."""

from __future__ import annotations

import doctest

import torch
from conftest import device_of


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Randomizes weights so that each affects the result, including those that start at 0, 1 or
    1e-4."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.numel() and weight.std(unbiased=False) < 0.05:
                weight.add_(torch.randn_like(weight) * 0.3)
    return module


def assert_reads_as(module, literal, *inputs, backend, tolerance=2e-5):
    """Asserts that the result and all gradients of module(*inputs) equal literal(weights, *inputs)
    in float64, with the module's weights by name: up to the tolerance, or up to the error budget if
    that is larger: twice the error of the literal reading in float32, which depends on the CPU; for
    gradients three times that error, plus a rounding of the largest gradient."""
    module = module.to(device_of(backend))
    near = [t.to(device_of(backend)) if isinstance(t, torch.Tensor) else t for t in inputs]
    found = _with_gradients(module(*near), dict(module.named_parameters()), near)
    wanted = _read(literal, module, inputs, torch.float64)
    assert found.keys() == wanted.keys()
    scale = max(float(w.norm()) for name, w in wanted.items() if name != "out")
    plain = None
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
        # A gradient that is 0 except for rounding (a bias of keys) is compared at the scale of the
        # others.
        floor = 1e-12 if name == "out" else 1e-3 * scale + 1e-12
        size = max(float(want.norm()), floor)
        error = float((found[name].double() - want).norm()) / size
        if error <= tolerance:
            continue
        plain = plain or _read(literal, module, inputs, torch.float32)
        times, rounding = (2, 0.0) if name == "out" else (3, 2**-23 * scale / size)
        budget = times * float((plain[name].double() - want).norm()) / size + rounding
        assert error <= budget, (name, error, budget)


def _read(literal, module, inputs, dtype):
    """Results of the literal reading in a dtype."""
    weights = {name: w.detach().cpu().to(dtype) for name, w in module.named_parameters()}
    given = [t.detach().cpu().to(dtype) if _real(t) else t for t in inputs]
    for t in (*weights.values(), *(g for g, i in zip(given, inputs, strict=True) if _trains(i))):
        t.requires_grad_()
    return _with_gradients(literal(weights, *given), weights, given)


def _real(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def _trains(t):
    return _real(t) and t.requires_grad


def _with_gradients(out, weights, inputs):
    leaves = dict(weights) | {f"input {i}": t for i, t in enumerate(inputs) if _trains(t)}
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(out.shape, generator=generator).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    named = zip(leaves, grads, strict=True)
    return {"out": out.detach().cpu()} | {n: g.cpu() for n, g in named if g is not None}


def run_examples(*objects):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    for thing in objects:
        found = finder.find(thing, thing.__name__)
        assert any(test.examples for test in found), thing
        for test in found:
            assert runner.run(test).failed == 0
