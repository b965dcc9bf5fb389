"""Properties and regressions of linear_attention_decode."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from each import each_backend, each_dtype, each_kernel, randn
from hypothesis import given
from hypothesis import strategies as st
from linear_oracle import close, inputs
from strategies import HEAD_DIMS, accepted_tokens
from tier import examples

import tokenmill as tm
from tokenmill import registry
from tokenmill.linear.linear_attention_cases import draw_state
from tokenmill.registry import Sample
from tokenmill.testing import compare

SPEC = registry.get("linear_attention_decode")
MAPS = ("identity", "elu1", "relu", "silu", "taylor2")


def slots(*found, backend="cpu"):
    return torch.tensor(found, dtype=torch.int32, device=device_of(backend))


@st.composite
def decode_samples(draw, max_batch=4, max_length=6):
    """Draws any combination of options; slots in any order, some skipped."""
    feature_map = draw(st.sampled_from(MAPS))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3)]))
    heads = kv_heads * group
    d, dv = draw(st.integers(1, 20) if feature_map == "taylor2" else HEAD_DIMS), draw(HEAD_DIMS)
    batch, length = draw(st.integers(0, max_batch)), draw(st.integers(0, max_length))
    normalize = draw(st.booleans()) if feature_map in ("elu1", "taylor2") else False
    decays = [None, "head", "token"] + (["channel"] if feature_map == "identity" else [])
    decay = draw(st.sampled_from(decays))
    order = draw(st.one_of(st.none(), st.permutations(range(6))))
    skipped = draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    accepted = draw(accepted_tokens(batch, length))
    scale = draw(st.sampled_from([None, 0.4]))

    def make(dtype, g):
        q, k, v = (
            torch.randn(batch, length, *shape, generator=g).to(dtype)
            for shape in ((heads, d), (kv_heads, d), (kv_heads, dv))
        )
        wide = torch.promote_types(dtype, torch.float32)
        kwargs = {"feature_map": feature_map, "normalize": normalize, "scale": scale}
        if decay is not None:
            shape = (heads,) if decay == "head" else (batch, length, heads)
            shape += (d,) if decay == "channel" else ()
            kwargs["log_decay"] = -3 * torch.rand(shape, generator=g).to(wide)
        if order is not None:
            found = [-1 if s else i for i, s in zip(order, skipped, strict=False)]
            kwargs["state_indices"] = torch.tensor(found, dtype=torch.int32)
        if accepted is not None:
            kwargs["accepted"] = torch.tensor(accepted, dtype=torch.int32)
        count = batch if order is None else 6
        state = draw_state((count, heads, d, dv), feature_map, normalize, dtype, g)
        return (q, k, v, state), kwargs

    shapes = f"q {(batch, length, heads, d)} kv heads {kv_heads} v {dv}"
    return Sample(f"{shapes} {feature_map} {normalize} {decay} {order} {skipped} {accepted}", make)


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(40)
@given(sample=decode_samples())
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype)
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_dtype
@examples(12)
@given(sample=decode_samples(max_batch=2, max_length=3))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@each_backend
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("step", [1, 3])
def test_steps_are_the_whole_sequence(step, gated, feature_map, backend):
    length, batch = 12, 2
    q, k, v = inputs(backend, length, heads=4, kv_heads=2, d=9, batch=batch)
    decay = -torch.rand((batch, length, 4) if gated else (4,)).to(q.device)
    options = {"feature_map": feature_map, "backend": backend}
    options["normalize"] = feature_map in ("elu1", "taylor2")
    whole, final = tm.linear_attention(q, k, v, log_decay=decay, return_final_state=True, **options)
    state = torch.zeros_like(final)
    outs = []
    for t in range(0, length, step):
        rows = slice(t, t + step)
        outs.append(
            tm.linear_attention_decode(
                *(x[:, rows] for x in (q, k, v)),
                state,
                log_decay=decay[:, rows] if gated else decay,
                **options,
            )
        )
    close(torch.cat(outs, 1), whole)
    close(state, final)


@each_backend
def test_only_the_slots_named_change(backend):
    q, k, v = inputs(backend, 2, batch=3)
    state = randn(5, 2, 16, 16, backend=backend)
    before = state.clone()
    out = tm.linear_attention_decode(
        q, k, v, state, state_indices=slots(3, -1, 0, backend=backend), backend=backend
    )
    assert torch.all(out[1] == 0)
    for untouched in (1, 2, 4):
        assert torch.equal(state[untouched], before[untouched])
    for request, slot in ((0, 3), (2, 0)):
        want, after = tm.linear_attention(
            *(t[request : request + 1] for t in (q, k, v)),
            initial_state=before[slot : slot + 1],
            return_final_state=True,
            backend=backend,
        )
        close(out[request : request + 1], want)
        close(state[slot : slot + 1], after)


@each_backend
def test_a_skipped_request_reads_nothing(backend):
    """Padding of a batch may hold any values."""
    q, k, v = (torch.full_like(t, float("nan")) for t in inputs(backend, 1, batch=2))
    state = randn(2, 2, 16, 16, backend=backend)
    before = state.clone()
    out = tm.linear_attention_decode(
        q, k, v, state, state_indices=slots(-1, -1, backend=backend), backend=backend
    )
    assert torch.all(out == 0) and torch.equal(state, before)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b in ("cpu", "reference")])
@pytest.mark.parametrize("bad", [(0, 3), (0, -2), (1, 1)], ids=str)
def test_nothing_is_written_by_a_refused_call(bad, backend):
    q, k, v = inputs(backend, 1, batch=2)
    state = randn(3, 2, 16, 16)
    before = state.clone()
    with pytest.raises(RuntimeError, match="state_indices: must"):
        tm.linear_attention_decode(q, k, v, state, state_indices=slots(*bad), backend=backend)
    assert torch.equal(state, before)


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_a_slot_out_of_range_is_skipped(backend):
    q, k, v = inputs(backend, 1, batch=4)
    state = randn(3, 2, 16, 16, backend=backend)
    before = state.clone()
    found = slots(3, -7, 2**31 - 1, 1, backend=backend)
    out = tm.linear_attention_decode(q, k, v, state, state_indices=found, backend=backend)
    assert torch.all(out[:3] == 0) and torch.any(out[3] != 0)
    assert torch.equal(state[::2], before[::2]) and not torch.equal(state[1], before[1])


@each_backend
def test_layers_may_share_one_cache(backend):
    """state may be a slice: one layer of [slots, layers, H, D, Dv]."""
    q, k, v = inputs(backend, 1, batch=2)
    cache = randn(3, 4, 2, 16, 16, backend=backend)
    before = cache.clone()
    alone = cache[:, 2].clone()
    want = tm.linear_attention_decode(q, k, v, alone, backend=backend)
    got = tm.linear_attention_decode(q, k, v, cache[:, 2], backend=backend)
    assert torch.equal(got, want) and torch.equal(cache[:, 2], alone)
    for layer in (0, 1, 3):
        assert torch.equal(cache[:, layer], before[:, layer])


@each_backend
def test_there_is_no_gradient(backend):
    q, k, v = inputs(backend, 1)
    state = randn(1, 2, 16, 16, backend=backend)
    q.requires_grad_()
    with pytest.raises(
        RuntimeError, match="q: must not require a gradient, as the call writes into"
    ):
        tm.linear_attention_decode(q, k, v, state, backend=backend)
    with torch.no_grad():
        assert not tm.linear_attention_decode(q, k, v, state, backend=backend).requires_grad
    with torch.inference_mode():
        tm.linear_attention_decode(q, k, v, state.clone(), backend=backend)


@each_kernel
def test_autograd_sees_that_a_saved_state_was_overwritten(backend):
    q, k, v = inputs(backend, 3)
    state = randn(1, 2, 16, 16, backend=backend)
    q.requires_grad_()
    out = tm.linear_attention(q, k, v, initial_state=state, backend=backend)
    with torch.no_grad():
        tm.linear_attention_decode(*(t[:, :1] for t in (q, k, v)), state, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_backend
@each_dtype
def test_state_keeps_its_digits_over_many_steps(dtype, backend):
    """A 16-bit state would stop growing at 256 (bfloat16) or 2048 (float16)."""
    ones = torch.ones(1, 1, 1, 4, dtype=dtype, device=device_of(backend))
    state = torch.full((1, 1, 4, 4), 5000.0, device=ones.device)
    for _ in range(3):
        out = tm.linear_attention_decode(ones, ones, ones, state, scale=0.25, backend=backend)
    assert torch.all(state == 5003)
    assert torch.all(out == torch.tensor(5003.0).to(dtype).to(out.device))
