"""Properties that need a device: nothing synchronizes, a graph follows the contents of its inputs,
the device agrees with the PTX machine. Without a GPU, the last test compares the machine with
itself in another order."""

from __future__ import annotations

import functools
from itertools import chain

import pytest
import torch
from conftest import backends, device_of
from test_contract import (
    DTYPES,
    SAMPLES,
    draw,
    same_bits,
    tensors,
)

import tokenmill as tm
from tokenmill import _explain
from tokenmill.testing import map_tensors

GPU = torch.cuda.is_available()
BACKEND = next((b for b in ("cuda", "emulated") if b in backends()), None)
pytestmark = pytest.mark.skipif(BACKEND is None, reason="neither a GPU nor the PTX machine")
needs_gpu = pytest.mark.skipif(not GPU, reason="the machine has neither graphs nor streams")
ABLE = [(o, s) for o, s in SAMPLES if _explain.able(o, s, BACKEND or "cuda")]
PACKED = [(spec, sample) for spec, sample in ABLE if "cu_seqlens_q" in draw(sample)[1]]
each_sample = pytest.mark.parametrize(
    ("spec", "sample"), ABLE, ids=[f"{spec.name}-{sample.name}" for spec, sample in ABLE]
)
each_packed = pytest.mark.parametrize(("spec", "sample"), PACKED, ids=lambda x: x.name)


def placed(sample, dtype=torch.float32, seed=0, backend=BACKEND):
    return map_tensors(draw(sample, dtype, seed), lambda t: t.to(device_of(backend)))


def forward_and_backward(spec, sample, args, kwargs, backend=BACKEND):
    """A function that computes outputs, written arguments, and gradients if there are any."""
    call = tm.testing.without_side_effects(spec, functools.partial(spec.function, backend=backend))
    cotangents = None
    if spec.gradients_of(sample):
        outputs = tm.testing.evaluate(call, args, kwargs)[0]
        cotangents = [torch.ones(o.shape, device=device_of(backend)) for o in outputs]

    def run():
        return [*chain(*tm.testing.evaluate(call, args, kwargs, cotangents))]

    return run


def captured(run):
    """A function that replays run and returns its outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = run()

    def replay():
        graph.replay()
        return static

    return replay


def overwrite(old, new):
    with torch.no_grad():
        for to, source in zip(tensors(old), tensors(new), strict=True):
            to.copy_(source)


@needs_gpu
@each_sample
def test_a_graph_follows_the_values_of_its_inputs(spec, sample):
    args, kwargs = placed(sample)
    replay = captured(forward_and_backward(spec, sample, args, kwargs))
    replay()
    other = placed(sample, seed=1)
    overwrite((args, kwargs), other)
    assert same_bits(replay(), forward_and_backward(spec, sample, *other)())


@needs_gpu
@each_packed
def test_a_graph_follows_the_lengths_of_its_sequences(spec, sample):
    args, kwargs = placed(sample)
    replay = captured(forward_and_backward(spec, sample, args, kwargs))
    replay()
    other_args, other_kwargs = placed(sample)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        lengths = other_kwargs[name].diff().flip(0)
        other_kwargs[name][1:] = lengths.cumsum(0)
        assert not torch.equal(other_kwargs[name], kwargs[name])
    overwrite((args, kwargs), (other_args, other_kwargs))
    assert same_bits(replay(), forward_and_backward(spec, sample, other_args, other_kwargs)())


@needs_gpu
@each_sample
def test_nothing_synchronises(spec, sample):
    run = forward_and_backward(spec, sample, *placed(sample))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif("emulated" not in backends(), reason="not a development build")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_sample
def test_the_device_agrees_with_the_machine(spec, sample, dtype):
    from tokenmill import _emulator

    on_device = forward_and_backward(spec, sample, *placed(sample, dtype))()
    there = placed(sample, dtype, backend="emulated")
    with _emulator.configured("order=reverse"):
        on_machine = forward_and_backward(spec, sample, *there, backend="emulated")()
    if not GPU:  # the machine in both orders of warps and CTAs
        assert same_bits(on_device, on_machine)
        return
    found = tm.testing.compare(spec, sample, "cuda", dtype, device="cuda", draws=4)
    allowed = [c.allowed for c in found]
    for got, want, limit in zip(on_device, on_machine, allowed, strict=True):
        assert tm.testing.error(got.cpu(), want) <= limit
