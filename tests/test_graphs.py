"""The first call of a function in a process is a compiled one, with dynamic sizes; and functions
run on fake tensors. Each test has its own process: caches of another call would hide a failure of
the trace."""

from __future__ import annotations

import inspect

import pytest
import torch
from fresh import context
from fuzz.compositions import COMPOSITIONS, Draw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tokenmill import masks, nn, policies, registry

# These read values on the host by design, or return no tensors.
HOST = {
    policies.choose_retrieval_heads,
    policies.profile_retrieval_heads,
    nn.keep_rate_schedule,
}
FUNCTIONS = {
    **{spec.name: spec.function for spec in registry.ops().values()},
    **{f.__name__: f for f in COMPOSITIONS if inspect.isfunction(f) and f not in HOST},
}
FUNCTIONS = {n: f for n, f in FUNCTIONS.items() if not f.__module__.startswith(masks.__name__)}


def arguments_of(name):
    """(args, kwargs) of a valid call, the same each time."""
    g = torch.Generator().manual_seed(0)
    if name in registry.ops():
        return registry.get(name).samples[0].make(torch.float32, g)
    return (), COMPOSITIONS[FUNCTIONS[name]][0](Draw(torch.float32, g))


def tensors_of(results):
    results = results if isinstance(results, tuple) else (results,)
    return [t for t in results if isinstance(t, torch.Tensor)]


def compile_first(name, sent):
    args, kwargs = arguments_of(name)
    function = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=True, backend="eager")
    found = tensors_of(function(*args, **kwargs))
    args, kwargs = arguments_of(name)
    wanted = tensors_of(FUNCTIONS[name](*args, **kwargs))
    mode = FakeTensorMode()
    args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, arguments_of(name))
    with mode:
        fake = tensors_of(FUNCTIONS[name](*args, **kwargs))
    sent.send(
        [
            all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)),
            [(t.shape, t.dtype) for t in wanted] == [(t.shape, t.dtype) for t in fake],
        ]
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_first_call_is_compiled(name):
    received, sent = context.Pipe(duplex=False)
    process = context.Process(target=compile_first, args=(name, sent))
    process.start()
    sent.close()
    try:
        same_bits, same_fakes = received.recv()
    except EOFError:
        process.join()
        pytest.fail(f"{name}: the process ended with {process.exitcode}")
    assert same_bits and same_fakes
