"""Properties of causal_conv1d_decode, and what released code computes: the update of a cache in
transformers (models/qwen3_next/modeling_qwen3_next.py, 5.x).
"""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from each import each_dtype, each_kernel, ints, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import accepted_tokens
from tier import examples

import tokenmill as tm
from tokenmill import registry
from tokenmill.registry import Sample
from tokenmill.testing import compare

SPEC = registry.get("causal_conv1d_decode")


@st.composite
def decode_samples(draw, max_batch=4, max_tokens=6, max_channels=70):
    """Any combination of options; slots in any order, some skipped, and caches in any layout."""
    width, channels = draw(st.integers(1, 8)), draw(st.integers(0, max_channels))
    batch, tokens = (
        draw(st.integers(0, max_batch)),
        draw(st.one_of(st.none(), st.integers(0, max_tokens))),
    )
    columns = width - 1 + draw(st.integers(0, 3))
    order = draw(st.one_of(st.none(), st.permutations(range(6))))
    skipped = draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    accepted = draw(accepted_tokens(batch, 1 if tokens is None else tokens))
    layout = draw(st.sampled_from(["plain", "channels last", "view"]))
    activation, bias = draw(st.sampled_from([None, "silu"])), draw(st.booleans())

    def make(dtype, g):
        def normal(*shape):
            return torch.randn(*shape, generator=g).to(dtype)

        kwargs = {"activation": activation}
        if order is not None:
            found = [-1 if s else i for i, s in zip(order, skipped, strict=False)]
            kwargs["state_indices"] = torch.tensor(found, dtype=torch.int32)
        if accepted is not None:
            kwargs["accepted"] = torch.tensor(accepted, dtype=torch.int32)
        count = batch if order is None else 6
        if layout == "channels last":
            state = normal(count, columns, channels).transpose(1, 2)
        elif layout == "view":
            state = normal(count, 2, channels, columns + 1)[:, 1, :, 1:]
        else:
            state = normal(count, channels, columns)
        x = normal(batch, channels) if tokens is None else normal(batch, tokens, channels)
        return (x, state, normal(channels, width), normal(channels) if bias else None), kwargs

    shapes = f"{batch} {tokens} C={channels} W={width} K={columns}"
    name = f"{shapes} {layout} {activation} {order} {accepted}"
    return Sample(name, make)


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(60)
@given(sample=decode_samples())
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype)
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_dtype
@examples(12)
@given(sample=decode_samples(max_batch=2, max_tokens=3, max_channels=20))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@each_kernel
@each_dtype
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("more", [0, 1])
def test_steps_are_the_whole_sequence(more, tokens, dtype, backend):
    x, weight = (randn(*s, dtype=dtype, backend=backend) for s in ((2, 12, 20), (20, 4)))
    bias = randn(20, dtype=dtype, backend=backend)
    options = {"activation": "silu", "backend": backend}
    whole, final = tm.causal_conv1d(x, weight, bias, return_final_state=True, **options)
    state = x.new_zeros(2, 20, 3 + more)
    outs = [tm.causal_conv1d_decode(t, state, weight, bias, **options) for t in x.split(tokens, 1)]
    assert torch.equal(torch.cat(outs, 1), whole)
    assert torch.equal(state[..., more:], final)
    assert torch.equal(state, x[:, 12 - 3 - more :].transpose(1, 2))


@each_kernel
def test_only_the_slots_named_change(backend):
    x, weight = randn(3, 20, backend=backend), randn(20, 4, backend=backend)
    state = randn(5, 20, 4, backend=backend)
    before = state.clone()
    slots = ints(3, -1, 0, backend=backend)
    out = tm.causal_conv1d_decode(x, state, weight, state_indices=slots, backend=backend)
    assert torch.all(out[1] == 0)
    assert torch.equal(state[[1, 2, 4]], before[[1, 2, 4]])
    for request, slot in ((0, 3), (2, 0)):
        own = before[slot : slot + 1].clone()
        want = tm.causal_conv1d_decode(x[request, None], own, weight, backend=backend)
        assert torch.equal(out[request], want[0])
        assert torch.equal(state[slot], own[0])


@each_kernel
def test_what_is_not_finite_stays_in_its_channel_and_leaves(backend):
    x, weight = randn(2, 6, 20, backend=backend), randn(20, 3, backend=backend)
    state = randn(2, 20, 4, backend=backend)
    clean = state.clone()
    wanted = tm.causal_conv1d_decode(x, clean, weight, activation="silu", backend=backend)
    state[1, 7, 1] = torch.nan  # older than the taps reach
    state[1, 7, 3] = torch.nan
    out = tm.causal_conv1d_decode(x, state, weight, activation="silu", backend=backend)
    assert out[1, :2, 7].isnan().all()
    out[1, :2, 7] = wanted[1, :2, 7]
    assert torch.equal(out, wanted)
    assert torch.equal(state, clean)


@each_dtype
def test_transformers_cache(dtype):
    """The fallback of a model, and its cache of W columns, which is used in place."""
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    update = getattr(module, "causal_conv1d_update", None)
    if update is None:
        pytest.skip("this version of transformers has no causal_conv1d_update")
    weight, bias, cache = (randn(*s, dtype=dtype) for s in ((6, 4), (6,), (2, 6, 4)))
    theirs, share = cache.clone(), 4 * torch.finfo(dtype).eps
    for _ in range(7):
        x = randn(2, 1, 6, dtype=dtype)
        want = update(x.transpose(1, 2), theirs, weight, bias, "silu").transpose(1, 2)
        out = tm.causal_conv1d_decode(x, cache, weight, bias, activation="silu")
        torch.testing.assert_close(out, want, atol=4 * share, rtol=share)
        assert torch.equal(cache, theirs)


@pytest.mark.parametrize("backend", [b for b in backends() if b not in ("cpu", "reference")])
def test_a_slot_out_of_range_is_skipped(backend, monkeypatch):
    """On GPUs, where values are not checked."""
    monkeypatch.setenv("TOKENMILL_CHECK", "0")
    x, weight = randn(2, 20, backend=backend), randn(20, 4, backend=backend)
    state = randn(3, 20, 3, backend=backend)
    before = state.clone()
    slots = ints(3, -7, backend=backend)
    op = getattr(torch.ops, f"tokenmill_{backend}" if backend != "cuda" else "tokenmill")
    out = op.causal_conv1d_decode(x, state, weight, None, state_indices=slots)
    assert torch.all(out == 0)
    assert torch.equal(state, before)
