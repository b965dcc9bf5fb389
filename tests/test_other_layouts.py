"""Memory layouts of other libraries: tensors that are copied, accepted as they are, or refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import device_of
from each import each_backend

import tokenmill as tm

Q = torch.randn(1, 8, 2, 8)
N = torch.tensor([8], dtype=torch.int32)


def test_an_array_is_not_printed():
    array = np.zeros((1, 8, 2, 8), np.float32)
    rule = r"must be a tensor; got a NumPy array \(tokenmill.dlpack takes arrays\)$"
    for function in (tm.attention, tm.linear_attention):
        with pytest.raises(tm.InputError, match=rf"^tokenmill\.{function.__name__}: q: {rule}"):
            function(array, Q, Q)


def last_apart(t):
    """The same values with a non-contiguous last dimension: a view of [B, H, D, S]."""
    return t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@each_backend
@pytest.mark.parametrize("op", ["attention", "linear_attention"])
def test_a_last_dimension_with_gaps_is_copied(op, backend):
    function, device = getattr(tm, op), device_of(backend)
    torch.manual_seed(0)
    leaves = [torch.randn(1, 9, 2, 8, device=device, requires_grad=True) for _ in range(3)]
    want = function(*leaves, backend=backend)
    grads = torch.autograd.grad(want.sum(), leaves)
    apart = [last_apart(t) for t in leaves]
    assert apart[0].stride(-1) != 1
    found = function(*apart, backend=backend)
    assert torch.equal(found, want)
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["attention", "linear_attention"])
def test_the_short_way_copies_and_says_so(op):
    """A call without backend, with and without gradient; the operator itself refuses."""
    function = getattr(tm, op)
    q, k, v = torch.randn(3, 2, 9, 2, 8).unbind()
    want = function(q, k, v)
    assert torch.equal(function(last_apart(q), k, last_apart(v)), want)
    leaf = q.clone().requires_grad_()
    function(last_apart(leaf), k, v).sum().backward()
    assert leaf.grad.abs().sum() > 0
    explained = tm.explain(op, last_apart(q), k, last_apart(v))
    assert explained.copied == ("q", "v")
    assert "copied: q, v (the last dimension is not contiguous)" in str(explained)
    assert not tm.explain(op, q, k, v).copied
    spec = tm.registry.get(op)
    lowered = spec.lower(q, last_apart(k), v)
    rule = rf"^tokenmill\.{op}: k: must have a contiguous last dimension; strides; got "
    with pytest.raises(RuntimeError, match=rule) as native:
        spec.forward.run("tokenmill", lowered)
    with pytest.raises(RuntimeError, match=rule) as ours:
        spec.forward.check(*lowered)
    assert str(native.value).splitlines()[0] == str(ours.value)


def test_queries_of_a_cache_are_copied_and_caches_are_not():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 16, 2, 8)
    n = torch.tensor([16, 9], dtype=torch.int32)
    want = tm.attention_decode(q, k, k, seqlens_k=n)
    assert torch.equal(tm.attention_decode(last_apart(q), k, k, seqlens_k=n), want)
    with pytest.raises(RuntimeError, match="k_cache: must have a contiguous last dimension"):
        tm.attention_decode(q, last_apart(k), k, seqlens_k=n)
    state = torch.zeros(2, 4, 8, 8)
    with pytest.raises(RuntimeError, match=r"state: must "):
        tm.linear_attention_decode(q, k[:, :3], k[:, :3], state.mT)


def test_a_copy_is_traced():
    run = torch.compile(lambda q: tm.attention(q, q, q), fullgraph=True, backend="eager")
    q = last_apart(torch.randn(1, 9, 2, 8))
    assert torch.equal(run(q), tm.attention(q, q, q))


def jagged(*lengths, heads=2, device="cpu", grad=False):
    rows = [torch.randn(n, heads, 8, device=device) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=grad)


@each_backend
@pytest.mark.parametrize("function", [tm.attention, tm.sigmoid_attention], ids=lambda f: f.__name__)
def test_jagged_tensors_are_packed_sequences(function, backend):
    torch.manual_seed(0)
    device = device_of(backend)
    q, k = jagged(3, 7, device=device, grad=True), jagged(5, 1, device=device)
    out = function(q, k, k, backend=backend)
    assert out.is_nested
    assert out.shape == q.shape  # the same ragged dimension: they can be added
    (out + q).values()
    for a, x, y in zip(out.unbind(), q.unbind(), k.unbind(), strict=True):
        torch.testing.assert_close(a, function(x[None], y[None], y[None])[0])
    out.values().square().sum().backward()
    assert q.grad.is_nested
    assert q.grad.values().abs().sum() > 0


def test_jagged_calls_have_the_other_options():
    q = jagged(3, 7)
    out, lse = tm.attention(q, q, q, causal=True, return_lse=True)
    assert lse.shape == (2, 10)
    first = tm.attention(*3 * [q.unbind()[0][None]], causal=True)[0]
    torch.testing.assert_close(out.unbind()[0], first)
    explained = tm.explain("attention", q, q, q, causal=True)
    assert explained.backend == "cpu"
    assert explained.error is None
    few = jagged(3, 7, heads=1)  # GQA
    assert tm.attention(q, few, few).shape == q.shape


def test_rules_of_jagged_tensors():
    q = jagged(3, 7)
    flat = torch.nested.nested_tensor([torch.randn(3, 2, 8)], layout=torch.strided)
    calls = [
        ((q, Q, Q), {}, "k: must be nested, as q is; got a tensor of shape"),
        ((q, q, jagged(4, 6)), {}, r"v: must have the lengths of k; got \[0, 4, 10\]"),
        ((q, q, q), {"cu_seqlens_q": N}, "cu_seqlens_q: must not be given with nested tensors"),
        ((q, q, q), {"out": Q}, "out: must not be given with nested tensors"),
        (3 * (q.transpose(1, 2),), {}, r"q: must be nested as \[B, \*, H, D\] without gaps"),
        (3 * (flat,), {}, "q: must be nested with layout=torch.jagged, or packed with cu_seqlens"),
    ]
    for args, options, rule in calls:
        with pytest.raises(tm.InputError, match=rf"^tokenmill\.attention: {rule}"):
            tm.attention(*args, **options)
        if "out" not in options:
            assert re.match(
                rf"tokenmill\.attention: {rule}", tm.explain("attention", *args, **options).error
            )
