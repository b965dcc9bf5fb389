"""Properties of causal_conv1d, and what released code computes: torch_causal_conv1d fallbacks of
transformers (models/qwen3_next/modeling_qwen3_next.py, 5.x), and causal_conv1d_fn of
Dao-AILab/causal-conv1d (causal_conv1d_interface.py at dedc05f), written anew on torch's conv1d.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import backends, device_of
from each import each_backend, each_dtype, each_kernel, ints, randn
from hypothesis import given
from hypothesis import strategies as st
from tier import examples
from torch.nn import functional

import tokenmill as tm
from tokenmill import registry
from tokenmill.registry import Sample
from tokenmill.testing import compare

SPEC = registry.get("causal_conv1d")


def released(x, weight, bias=None, state=None, *, activation=None):
    """x [B, T, C], state [B, C, W - 1]: out, and the last W - 1 inputs."""
    back = weight.shape[1] - 1
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], back)
    inputs = torch.cat([state, x.transpose(1, 2)], -1)
    out = functional.conv1d(inputs, weight[:, None], bias, groups=x.shape[2])
    out = functional.silu(out) if activation == "silu" else out
    return out.transpose(1, 2), inputs[..., inputs.shape[-1] - back :]


def draw(*lead, c=5, w=4, states=2, seed=0):
    """x, weight, bias, state in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return [normal(*lead, c), normal(c, w), normal(c), normal(states, c, w - 1)]


def run(x, weight, bias=None, state=None, **options):
    return tm.causal_conv1d(
        x, weight, bias, initial_state=state, return_final_state=True, **options
    )


def with_gradients(function, given, **options):
    """The results, and the gradients of one combination of them."""
    leaves = [t.detach().requires_grad_() for t in given]
    results = function(*leaves, **options)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in results]
    found = torch.autograd.grad(results, leaves, weights, allow_unused=True, materialize_grads=True)
    return *results, *found


def close(found, wanted, share=1e-5):
    for a, b in zip(found, wanted, strict=True):
        size = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), atol=share * size, rtol=0)


@st.composite
def conv_samples(draw, max_length=40, max_channels=70):
    """Any combination of options."""
    width, channels = draw(st.integers(1, 8)), draw(st.integers(0, max_channels))
    length = st.one_of(st.integers(0, 9), st.integers(0, max_length))
    packed = draw(st.booleans())
    lengths = (
        draw(st.lists(length, max_size=4)) if packed else [draw(length)] * draw(st.integers(0, 2))
    )
    lead = (sum(lengths),) if packed else (len(lengths), lengths[0] if lengths else 3)
    layout = draw(st.sampled_from(["plain", "part", "channels first", "every second token"]))
    options = {
        "activation": draw(st.sampled_from([None, "silu"])),
        "return_final_state": draw(st.booleans()),
    }
    state, bias, wide = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())

    def make(dtype, g):
        def normal(*shape):
            return torch.randn(*shape, generator=g).to(dtype)

        if layout == "plain":
            x = normal(*lead, channels)
        elif layout == "part":
            x = normal(*lead, 3 * channels)[..., channels : 2 * channels]
        elif layout == "channels first":
            x = normal(*lead[:-1], channels, lead[-1]).transpose(-1, -2)
        else:
            x = normal(*lead[:-1], 2 * lead[-1], channels)[..., ::2, :]
        filters = torch.promote_types(dtype, torch.float32) if wide else dtype
        kwargs = dict(options)
        if packed:
            kwargs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
        if state:  # a view of a cache with a column more
            kwargs["initial_state"] = normal(len(lengths), channels, width)[..., 1:]
        weight = normal(width, channels).T.to(filters)
        return (x, weight, normal(channels).to(filters) if bias else None), kwargs

    name = (
        f"{lead} lengths {lengths} C={channels} W={width} {layout} {options} {state} {bias} {wide}"
    )
    return Sample(name, make)


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(60)
@given(sample=conv_samples())
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype)
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_dtype
@examples(12)
@given(sample=conv_samples(max_length=12, max_channels=20))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", range(1, 9))
def test_released_code(width, activation):
    """Also on sequences shorter than the state."""
    for length in (1, 2, 5, 67):
        given = draw(2, length, c=3, w=width)
        wanted = with_gradients(released, given, activation=activation)
        found = with_gradients(run, given, activation=activation, backend="reference")
        close(found, wanted, 1e-12)
        narrow = [t.float() for t in given]
        close(with_gradients(run, narrow, activation=activation), wanted)


def test_transformers_fallback():
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    fallback = getattr(module, "causal_conv1d_fn", None)
    if fallback is None:
        pytest.skip("this version of transformers has no causal_conv1d_fn")
    for length in (1, 3, 50):
        x, weight, bias, _ = (t.float() for t in draw(2, length, c=6))
        wanted = fallback(x.transpose(1, 2), weight, bias, activation="silu")
        out = tm.causal_conv1d(x, weight, bias, activation="silu")
        torch.testing.assert_close(out, wanted.transpose(1, 2), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_the_reference(activation, packed):
    given = draw(*((6,) if packed else (2, 3)), c=2, w=3)
    options = {"activation": activation, "backend": "reference"}
    if packed:
        options["cu_seqlens"] = ints(0, 1, 6)
    inputs = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(lambda *t: run(*t, **options), inputs)


@each_kernel
@each_dtype
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_chunks_are_the_whole_sequence(width, dtype, backend):
    """Cut anywhere, also into chunks shorter than the state."""
    x, weight = randn(2, 23, 20, dtype=dtype, backend=backend), randn(20, width, backend=backend)
    options = {"activation": "silu", "return_final_state": True, "backend": backend}
    whole, final = tm.causal_conv1d(x, weight.to(dtype), **options)
    outs, state = [], None
    for a, b in pairwise((0, 1, 3, 3, 12, 22, 23)):
        out, state = tm.causal_conv1d(x[:, a:b], weight.to(dtype), initial_state=state, **options)
        outs.append(out)
    assert torch.equal(torch.cat(outs, 1), whole)
    assert torch.equal(state, final)
    assert torch.equal(state, x[:, 23 - (width - 1) :].transpose(1, 2))


@each_kernel
def test_packed_sequences_are_the_single_ones(backend):
    offsets = (0, 4, 4, 21, 22, 24)
    x, weight, bias, state = (
        t.float().to(device_of(backend)) for t in draw(24, c=20, w=4, states=5)
    )
    options = {"activation": "silu", "backend": backend}
    out, final = run(x, weight, bias, state, cu_seqlens=ints(*offsets, backend=backend), **options)
    for i, (a, b) in enumerate(pairwise(offsets)):
        alone, last = run(x[None, a:b], weight, bias, state[i, None], **options)
        assert torch.equal(out[a:b], alone[0])
        assert torch.equal(final[i], last[0])


@each_kernel
def test_what_is_not_finite_stays_where_it_is(backend):
    """In its channel and its sequence, and in the W tokens that see it."""
    offsets, at = ints(0, 10, 20, backend=backend), 12
    x, weight, bias, state = (t.float().to(device_of(backend)) for t in draw(20, c=20))
    options = {"activation": "silu", "cu_seqlens": offsets, "backend": backend}
    clean, last = run(x, weight, bias, state, **options)
    for value in (torch.nan, torch.inf):
        x[at, 3] = value
        out, after = run(x, weight, bias, state, **options)
        assert not out[at : at + 4, 3].isfinite().all()
        assert torch.equal(last, after)  # the value has left the state
        x[at, 3] = 0.0
        kept = torch.ones_like(out, dtype=torch.bool)
        kept[at : at + 4, 3] = False
        assert torch.equal(out[kept], clean[kept])


@each_backend
def test_gradients_beyond_the_end_meet_no_tap(backend):
    """The gradient of the last token has one product, whatever the other taps."""
    x, weight, bias, _ = (t.float().to(device_of(backend)) for t in draw(1, 6, c=3))
    weight[:, 0] = torch.inf
    x.requires_grad_()
    out = tm.causal_conv1d(x, weight, bias, backend=backend)
    [dx] = torch.autograd.grad(out, x, torch.ones_like(out))
    assert dx[:, 3:].isfinite().all()
    assert not dx[:, :3].isfinite().any()
    torch.testing.assert_close(dx[:, 5], weight[None, :, 3])


def test_bits_do_not_depend_on_threads_strides_or_packing():
    given = [t.float() for t in draw(3, 700, c=300, states=3)]
    wanted = with_gradients(run, given, activation="silu")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = with_gradients(run, given, activation="silu")
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    finally:
        torch.set_num_threads(threads)
    x, *rest = given
    apart = [
        torch.empty(3, 700, 400)[..., 50:350].copy_(x),
        *(t.mT.clone().mT if t.dim() > 1 else t for t in rest),
    ]
    found = with_gradients(run, apart, activation="silu")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    packed = with_gradients(
        run, [x.flatten(0, 1), *rest], activation="silu", cu_seqlens=ints(0, 700, 1400, 2100)
    )
    assert all(torch.equal(a.view_as(b), b) for a, b in zip(packed, wanted, strict=True))


def test_a_long_sum_of_gradients_keeps_its_digits():
    """The gradient of the bias is a count: float32 sums of single ones would stop at 2^24, and lose
    digits before."""
    x = torch.zeros(1, 40_000, 1)
    weight, bias = torch.zeros(1, 4, requires_grad=True), torch.zeros(1, requires_grad=True)
    dout = torch.full_like(x, 1.1)
    _, dbias = torch.autograd.grad(tm.causal_conv1d(x, weight, bias), (weight, bias), dout)
    torch.testing.assert_close(dbias.double(), 40_000 * dout[0, 0].double(), atol=0, rtol=5e-6)
