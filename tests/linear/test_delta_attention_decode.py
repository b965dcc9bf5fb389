"""Properties and regressions of delta_attention_decode."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from each import each_backend, each_dtype, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import HEAD_DIMS, accepted_tokens
from tier import examples
from torch.nn.functional import logsigmoid, normalize

import tokenmill as tm
from tokenmill import registry
from tokenmill.registry import Sample
from tokenmill.testing import compare

SPEC = registry.get("delta_attention_decode")
KINDS = (None, "head", "channel")


def slots(*found, backend="cpu"):
    return torch.tensor(found, dtype=torch.int32, device=device_of(backend))


def draw(batch, length, heads=2, key_heads=1, d=16, dv=16, kind="head", g=None):
    """q, k, v, beta and log_decay in float32."""
    g = g or torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, count, n, generator=g)
        for count, n in ((key_heads, d), (key_heads, d), (heads, dv))
    )
    beta = 2 * torch.rand(batch, length, heads, generator=g)
    shape = (batch, length, heads, d) if kind == "channel" else (batch, length, heads)
    decay = None if kind is None else logsigmoid(torch.randn(shape, generator=g) + 2)
    return [q, normalize(k, dim=-1), v, beta, decay]


def inputs(backend, *args, **options):
    return [t if t is None else t.to(device_of(backend)) for t in draw(*args, **options)]


def decode(q, k, v, beta, decay, state, **options):
    return tm.delta_attention_decode(q, k, v, beta, state, log_decay=decay, **options)


@st.composite
def decode_samples(draw_from, max_batch=4, max_length=6):
    """Draws any combination of options; slots in any order, some skipped."""
    heads, key_heads = draw_from(st.sampled_from([(1, 1), (2, 1), (4, 4), (6, 2)]))
    d, dv, kind = draw_from(HEAD_DIMS), draw_from(HEAD_DIMS), draw_from(st.sampled_from(KINDS))
    batch = draw_from(st.integers(0, max_batch))
    length = draw_from(st.integers(0, max_length))
    steep = draw_from(st.sampled_from([0.01, 1.0, 30.0, 1000.0]))
    order = draw_from(st.one_of(st.none(), st.permutations(range(6))))
    skipped = draw_from(st.lists(st.booleans(), min_size=batch, max_size=batch))
    accepted = draw_from(accepted_tokens(batch, length))
    options = {"scale": draw_from(st.sampled_from([None, 0.4]))}
    options["qk_l2norm"] = draw_from(st.booleans())

    def make(dtype, g):
        *tensors, beta, decay = draw(batch, length, heads, key_heads, d, dv, kind, g)
        wide = torch.promote_types(dtype, torch.float32)
        kwargs = dict(options)
        if decay is not None:
            kwargs["log_decay"] = decay.to(wide) * steep
        if order is not None:
            found = [-1 if s else i for i, s in zip(order, skipped, strict=False)]
            kwargs["state_indices"] = torch.tensor(found, dtype=torch.int32)
        if accepted is not None:
            kwargs["accepted"] = torch.tensor(accepted, dtype=torch.int32)
        count = batch if order is None else 6
        state = torch.randn(count, heads, d, dv, generator=g).to(wide)
        return (*(t.to(dtype) for t in tensors), beta.to(wide), state), kwargs

    shapes = f"{batch} x {length} heads {heads} of {key_heads}, {d} and {dv}"
    return Sample(f"{shapes} {kind} {steep} {options} {order} {skipped} {accepted}", make)


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(40)
@given(sample=decode_samples())
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype)
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_dtype
@examples(10)
@given(sample=decode_samples(max_batch=2, max_length=3))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 3])
def test_steps_are_the_whole_sequence(step, kind, backend):
    """delta_attention solves for chunks; it has no CUDA kernel, so the CPU is its witness."""
    given_ = draw(2, 12, heads=4, key_heads=2, d=9, kind=kind)
    q, k, v, beta, decay = given_
    whole, final = tm.delta_attention(
        q, k, v, beta, log_decay=decay, qk_l2norm=True, return_final_state=True, backend="cpu"
    )
    state, outs = torch.zeros_like(final, device=device_of(backend)), []
    for t in range(0, 12, step):
        piece = (t_ if t_ is None else t_[:, t : t + step].to(state.device) for t_ in given_)
        outs.append(decode(*piece, state, qk_l2norm=True, backend=backend))
    torch.testing.assert_close(torch.cat(outs, 1).cpu(), whole, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(state.cpu(), final, atol=2e-5, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_of_several_tokens_has_the_bits_of_single_steps(kind, backend):
    given_ = inputs(backend, 2, 4, d=40, dv=70, kind=kind)
    state = randn(2, 2, 40, 70, backend=backend)
    alone = state.clone()
    together = decode(*given_, state, backend=backend)
    pieces = [t if t is None else t.split(1, 1) for t in given_]
    steps = [
        decode(*(p if p is None else p[t] for p in pieces), alone, backend=backend)
        for t in range(4)
    ]
    if backend == "reference":  # a matrix product of its own shape
        torch.testing.assert_close(torch.cat(steps, 1), together)
        return
    assert torch.equal(torch.cat(steps, 1), together) and torch.equal(alone, state)


@each_backend
def test_only_the_slots_named_change(backend):
    given_ = inputs(backend, 3, 2)
    state = randn(5, 2, 16, 16, backend=backend)
    before = state.clone()
    out = decode(*given_, state, state_indices=slots(3, -1, 0, backend=backend), backend=backend)
    assert torch.all(out[1] == 0)
    for untouched in (1, 2, 4):
        assert torch.equal(state[untouched], before[untouched])
    for request, slot in ((0, 3), (2, 0)):
        own = before[slot : slot + 1].clone()
        want = decode(*(t[request : request + 1] for t in given_), own, backend=backend)
        torch.testing.assert_close(out[request : request + 1], want)
        torch.testing.assert_close(state[slot : slot + 1], own)


@each_backend
def test_a_skipped_request_reads_nothing(backend):
    """Padding of a batch may hold any values."""
    given_ = [torch.full_like(t, float("nan")) for t in inputs(backend, 2, 1)]
    state = randn(2, 2, 16, 16, backend=backend)
    before = state.clone()
    out = decode(*given_, state, state_indices=slots(-1, -1, backend=backend), backend=backend)
    assert torch.all(out == 0) and torch.equal(state, before)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b in ("cpu", "reference")])
@pytest.mark.parametrize("bad", [(0, 3), (0, -2), (1, 1)], ids=str)
def test_nothing_is_written_by_a_refused_call(bad, backend):
    state = randn(3, 2, 16, 16)
    before = state.clone()
    with pytest.raises(RuntimeError, match="state_indices: must"):
        decode(*draw(2, 1), state, state_indices=slots(*bad), backend=backend)
    assert torch.equal(state, before)


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_a_slot_out_of_range_is_skipped(backend):
    state = randn(3, 2, 16, 16, backend=backend)
    before = state.clone()
    found = slots(3, -7, 2**31 - 1, 1, backend=backend)
    out = decode(*inputs(backend, 4, 1), state, state_indices=found, backend=backend)
    assert torch.all(out[:3] == 0) and torch.any(out[3] != 0)
    assert torch.equal(state[::2], before[::2]) and not torch.equal(state[1], before[1])


@each_backend
def test_layers_may_share_one_cache(backend):
    """state may be a slice: one layer of [slots, layers, H, D, Dv]."""
    given_ = inputs(backend, 2, 1)
    cache = randn(3, 4, 2, 16, 16, backend=backend)
    before = cache.clone()
    alone = cache[:, 2].clone()
    want = decode(*given_, alone, backend=backend)
    assert torch.equal(decode(*given_, cache[:, 2], backend=backend), want)
    assert torch.equal(cache[:, 2], alone)
    for layer in (0, 1, 3):
        assert torch.equal(cache[:, layer], before[:, layer])


@each_backend
def test_what_is_not_finite_stays_in_its_column_and_head(backend):
    q, k, v, beta, decay = inputs(backend, 1, 2)
    state = randn(1, 2, 16, 16, backend=backend)
    clean = state.clone()
    want = decode(q, k, v, beta, decay, clean, backend=backend)
    v[0, 0, 1, 5] = float("nan")
    out = decode(q, k, v, beta, decay, state, backend=backend)
    spoiled = torch.zeros_like(out, dtype=torch.bool)
    spoiled[:, :, 1, 5] = True
    assert torch.equal(out.isnan(), spoiled)
    assert torch.equal(out[~spoiled], want[~spoiled])
    assert torch.equal(state.isnan().any(2)[0, 1], spoiled[0, 0, 1])


@each_backend
def test_a_steep_gate_forgets(backend):
    q, k, v, beta, decay = inputs(backend, 1, 1)
    decay[:] = -torch.inf
    old, none = randn(1, 2, 16, 16, backend=backend), randn(1, 2, 16, 16, backend=backend)
    none.zero_()
    out = decode(q, k, v, beta, decay, old, backend=backend)
    want = decode(q, k, v, beta, decay, none, backend=backend)
    assert torch.equal(out, want) and torch.equal(old, none)


@each_backend
def test_beta_may_have_16_bits_and_states_have_32(backend):
    q, k, v, beta, decay = inputs(backend, 1, 1)
    state = randn(1, 2, 16, 16, backend=backend)
    other = state.clone()
    out = decode(q, k, v, beta.bfloat16(), decay, state, backend=backend)
    want = decode(q, k, v, beta.bfloat16().float(), decay, other, backend=backend)
    assert torch.equal(out, want) and torch.equal(state, other)


@each_backend
def test_there_is_no_gradient(backend):
    q, *rest = inputs(backend, 1, 1)
    state = randn(1, 2, 16, 16, backend=backend)
    q.requires_grad_()
    with pytest.raises(
        RuntimeError, match="q: must not require a gradient, as the call writes into"
    ):
        decode(q, *rest, state, backend=backend)
    with torch.no_grad():
        assert not decode(q, *rest, state, backend=backend).requires_grad
