"""Sizes of zero, from the registry: calls return, and every element of the results is written."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from conftest import device_of
from each import each_backend, each_kernel

import tokenmill as tm
from tokenmill import _explain, registry
from tokenmill._call import choose
from tokenmill.testing import evaluate, map_tensors, without_side_effects

SPECS = list(registry.ops().values())


def places_of(args, kwargs):
    """Arguments that are tensors, by position or name."""
    given = [*enumerate(args), *kwargs.items()]
    return {name: t for name, t in given if isinstance(t, torch.Tensor)}


def cuts(tensors, pairs):
    """Dimensions to cut to zero together: all of one size or of two sizes, or a single one."""
    dims = [(name, d, size) for name, t in tensors.items() for d, size in enumerate(t.shape)]
    sizes = sorted({size for *_, size in dims if size > 0})
    for count in (1, 2) if pairs else (1,):
        for some in itertools.combinations(sizes, count):
            yield {(name, d) for name, d, size in dims if size in some}
    yield from ({(name, d)} for name, d, size in dims if size > 0)


def cut(args, kwargs, dims, fill):
    """The call with size zero in those dimensions, and all integers equal to fill unless it is
    None."""
    args, kwargs = list(args), dict(kwargs)
    for name, t in places_of(args, kwargs).items():
        for d in [d for n, d in dims if n == name]:
            t = t.narrow(d, 0, 0)
        if fill is not None and t.dtype in (torch.int32, torch.int64):
            t = torch.full_like(t, fill)
        (args if isinstance(name, int) else kwargs)[name] = t
    return args, kwargs


def calls(sample, pairs):
    """For each cut, the call as it is, and with ids and lengths that are valid for any size."""
    args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
    seen = set()
    for dims in cuts(places_of(args, kwargs), pairs):
        call = cut(args, kwargs, dims, None)
        shapes = tuple((n, tuple(t.shape)) for n, t in places_of(*call).items())
        if shapes not in seen:
            seen.add(shapes)
            yield call, cut(args, kwargs, dims, 0)


def results(spec, sample, backend, args, kwargs):
    """Outputs and gradients, no gradients if the backend has none."""
    function = without_side_effects(spec, functools.partial(spec.function, backend=backend))
    outputs, _ = evaluate(function, args, kwargs)
    lowered = spec.lower(*args, **kwargs)
    if not spec.gradients_of(sample) or _explain.unsupported_gradients(spec, backend, lowered):
        return outputs, []
    return evaluate(function, args, kwargs, [torch.ones_like(o) for o in outputs])


@functools.cache
def wanted(op):
    """Calls of an operator that the reference accepts, and its result or error for each."""
    spec, found = registry.get(op), []
    for sample in spec.samples:
        for either in calls(sample, pairs=sample is spec.samples[0]):
            for args, kwargs in either:
                try:
                    want = results(spec, sample, "reference", args, kwargs)
                    found.append((sample, args, kwargs, want))
                    break
                except RuntimeError as error:
                    assert str(error).startswith("tokenmill."), error
    return found


@each_kernel
@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
def test_sizes_of_zero(spec, backend):
    tried = wanted(spec.name)
    assert tried
    if backend == "triton" and device_of(backend) == "cpu":  # the interpreter is slow
        numbers = [sum(t.numel() for part in want for t in part) for *_, want in tried]
        order = sorted((n, i) for i, n in enumerate(numbers) if n)
        tried = [tried[i] for _, i in order[:3]]
    for sample, args, kwargs, want in tried:
        there, options = map_tensors((args, kwargs), lambda t: t.to(device_of(backend)))
        if spec.unsupported and choose.reasons(spec, backend, spec.lower(*there, **options)):
            continue
        outputs, gradients = results(spec, sample, backend, there, options)
        pairs = [*zip(outputs, want[0], strict=True)]
        if gradients:
            pairs += zip(gradients, want[1], strict=True)
        for a, b in pairs:
            if a.dtype == b.dtype == torch.float8_e4m3fn:  # compared by its bits only
                a, b = a.float(), b.float()
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3, equal_nan=True)


@each_backend
def test_tokens_without_channels_have_a_sum_of_weights(backend):
    x, weight = torch.randn(2, 1, 0), torch.rand(2, 0)
    none = torch.empty(2, 0, dtype=torch.int32)
    x, weight, none = (t.to(device_of(backend)) for t in (x, weight, none))
    assert tm.gather_fuse(x, none, none, weight, backend=backend).shape == (2, 2, 0)
