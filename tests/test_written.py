"""Arguments that a call writes into, for every operator that writes."""

from __future__ import annotations

import gc
import inspect

import pytest
import torch
from conftest import backends, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from test_contract import draw

import tokenmill as tm
from tokenmill import registry
from tokenmill._call import choose, rules, run
from tokenmill.testing import map_tensors

IN_PLACE = [spec for spec in registry.ops().values() if spec.forward.written]
WITH_OUT = [spec for spec in registry.ops().values() if spec.out]
EITHER = [(spec, spec.forward) for spec in IN_PLACE] + [(spec, spec.out) for spec in WITH_OUT]

CALLS = [
    pytest.param(spec, op, name, backend, id=f"{op.name}-{name}-{backend}")
    for spec, op in EITHER
    for name in op.written
    for backend in backends()
    if backend != "triton" or op.triton
]


def arguments(spec, op, name, backend):
    """Schema arguments of the first sample that gives the named argument."""
    for sample in spec.samples:
        args, kwargs = draw(sample)
        lowered = list(spec.lower(*args, **kwargs))
        if op is not spec.forward or lowered[op.arguments.index(name)] is not None:
            break
    if op is not spec.forward:
        lowered.append(op_out(spec, args, kwargs))
    device = device_of(backend)
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in lowered]


def op_out(spec, args, kwargs):
    result = spec.function(*args, **kwargs)
    return torch.zeros_like(result[0] if isinstance(result, tuple) else result)


@pytest.mark.parametrize(("spec", "op", "name", "backend"), CALLS)
def test_lazy_negatives_are_refused_and_do_no_harm(spec, op, name, backend):
    """This includes torch.ops, whose own write to one aborts the process when it is collected."""
    lowered = arguments(spec, op, name, backend)
    at = op.arguments.index(name)
    before = lowered[at].clone()
    view = torch._neg_view(lowered[at])
    edited = [*lowered[:at], view, *lowered[at + 1 :]]
    said = (
        name if name in inspect.signature(spec.function).parameters else name.removesuffix("_out")
    )
    rule = rf"^tokenmill\.{spec.name}: {said}: must not be a negative or conjugate view; got a tens"
    with pytest.raises(RuntimeError, match=rule):
        op.run(choose.namespace(backend), edited)
    if op is spec.forward:
        with pytest.raises(RuntimeError, match=rule):
            run.call(spec, tuple(edited), None, backend)
    cycle = [view]
    cycle.append(cycle)
    del view, cycle, edited
    gc.collect()
    assert torch.equal(lowered[at], before)


def test_a_graph_refuses_lazy_negatives():
    """torch would lose the written values."""
    q, state = torch.randn(1, 1, 2, 8), torch.zeros(1, 2, 8, 8)

    def run(q, state):
        return tm.linear_attention_decode(q, q, q, torch._neg_view(state))

    with pytest.raises(RuntimeError, match="state: must not be a negative or conjugate view"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(q, state)


@each_backend
def test_a_negative_that_repeats_is_read_beside_what_is_written(backend):
    """It gets its own strides only when it is negated."""
    caches = torch.zeros(2, 1, 8, 2, 4, device=device_of(backend))
    places = torch.tensor([[-3]], dtype=torch.int32, device=device_of(backend))
    counts = torch.tensor([1], dtype=torch.int32, device=device_of(backend))
    keep = torch._neg_view(places).expand(1, 4)
    lengths = tm.kv_cache_compact(*caches, keep, counts, backend=backend)
    assert lengths.tolist() == [1]


@each_backend
def test_lazy_negatives_are_read_as_what_they_stand_for(backend):
    q, k, v = torch.randn(3, 1, 5, 2, 8, device=device_of(backend))
    state = torch.randn(1, 2, 8, 8, device=device_of(backend))
    want = tm.attention(q, k, -v, backend=backend)
    for negative in (torch._neg_view(v), torch.complex(k, v).conj().imag):
        found = tm.attention(q, k, negative.contiguous(), backend=backend)
        assert torch.equal(found, want)
    negative = torch._neg_view(v)
    assert torch.equal(tm.attention(q, k, negative, backend=backend), want)
    states = state.clone(), state.clone()
    want = tm.linear_attention_decode(q[:, :1], k[:, :1], -v[:, :1], states[0], backend=backend)
    found = tm.linear_attention_decode(
        q[:, :1], k[:, :1], negative[:, :1], states[1], backend=backend
    )
    assert torch.equal(want, found)
    assert torch.equal(*states)


@each_backend
def test_parts_of_one_tensor_are_apart(backend):
    """Keys and values share one cache, in any layout."""
    keep = torch.tensor([[1, 3, 4], [0, 5, 7]], dtype=torch.int32)
    counts = torch.tensor([3, 2], dtype=torch.int32)
    device = device_of(backend)
    keep, counts = keep.to(device), counts.to(device)
    k, v = torch.randn(2, 2, 8, 3, 4, device=device)
    want = k.clone(), v.clone()
    tm.kv_cache_compact(*want, keep, counts, backend=backend)
    gap = torch.zeros(2, 2 * 8 * 3 * 4 + 5, device=device)  # after each page
    for dim in (*range(4), None):
        if dim is None:
            parts = gap[:, :-5].view(2, 8, 3, 2, 4).unbind(3)
            for part, x in zip(parts, (k, v), strict=True):
                part.copy_(x)
        else:
            parts = torch.stack([k, v], dim).unbind(dim)
        tm.kv_cache_compact(*parts, keep, counts, backend=backend)
        for found, wanted in zip(parts, want, strict=True):
            assert torch.equal(found, wanted)


@st.composite
def layouts(draw):
    """(offset, sizes, strides) of a view of 121 elements."""
    rank = draw(st.integers(0, 3))
    sizes = draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank))
    strides = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12]), min_size=rank,
                            max_size=rank))  # fmt: skip
    return draw(st.integers(0, 12)), sizes, strides


@given(layouts(), layouts())
def test_overlap_is_never_missed(first, second):
    memory = torch.arange(121.0)  # 12 + 3 x 3 x 12 is the last element of a view
    a, b = (memory.as_strided(sizes, strides, offset) for offset, sizes, strides in (first, second))
    here, there = a.flatten().tolist(), b.flatten().tolist()
    for read, broken in ({}, len(set(here)) < len(here)), ({"b": b}, set(here) & set(there)):
        if broken:
            with pytest.raises(RuntimeError, match=r"^tokenmill\.op: a: must "):
                rules.check_written("op", "a", a, read)


OUT_CALLS = [
    pytest.param(spec, sample, backend, id=f"{spec.name}-{sample.name}-{backend}")
    for spec in WITH_OUT
    for backend in backends("reference")
    for sample in (spec.samples[:1] if backend in ("emulated", "triton") else spec.samples[::4])
]


@pytest.mark.parametrize(("spec", "sample", "backend"), OUT_CALLS)
def test_out_gets_the_bits_of_a_new_result(spec, sample, backend):
    """This includes wider rows, of which nothing else is written."""
    args, kwargs = map_tensors(draw(sample), lambda t: t.to(device_of(backend)))
    results = tm.testing.tensors_of(spec.function(*args, **kwargs, backend=backend))
    want = results[0]
    wide = torch.full((*want.shape[:-1], want.shape[-1] + 3), 7.0, device=want.device)
    wide = wide.to(want.dtype)
    out = wide[..., 1:-2]
    found = tm.testing.tensors_of(spec.function(*args, **kwargs, out=out, backend=backend))
    assert found[0] is out
    assert all(torch.equal(a, b) for a, b in zip(found, results, strict=True))
    assert (wide[..., :1] == 7).all() and (wide[..., -2:] == 7).all()
    asked = [t for t in tm.testing.tensors_of(args) if t.is_floating_point()]
    asked[0].requires_grad_()
    why = "there is none" if sample.forward_only else "as the call writes into"
    with pytest.raises(RuntimeError, match=f"must not require a gradient, {why}"):
        spec.function(*args, **kwargs, out=out, backend=backend)


@pytest.mark.parametrize("backend", [b for b in backends() if b not in ("cpu", "triton")])
@pytest.mark.parametrize("function", [tm.attention, tm.linear_attention])
def test_tokens_of_no_sequence_are_written_in_place(function, backend):
    """A GPU does not check that sequences cover all tokens."""
    q = torch.randn(3, 2, 8, device=device_of(backend))
    starts = torch.zeros(1, dtype=torch.int32, device=q.device)
    name = "cu_seqlens_q" if function is tm.attention else "cu_seqlens"
    wide = torch.full((3, 2, 11), 7.0, device=q.device)
    function(q, q, q, **{name: starts}, out=wide[..., 1:-2], backend=backend)
    assert (wide[..., 1:-2] == 0).all()
    assert (wide[..., :1] == 7).all() and (wide[..., -2:] == 7).all()
