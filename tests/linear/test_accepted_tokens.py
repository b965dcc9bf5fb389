"""Speculative decoding: states that keep the first tokens of a call."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from each import each_backend, ints, randn
from torch.nn.functional import logsigmoid, normalize

import tokenmill as tm

TOKENS = 5


def delta(backend, channels=False):
    q, k, v = (randn(3, TOKENS, h, d, backend=backend) for h, d in ((1, 40), (1, 40), (2, 70)))
    beta, gates = torch.rand(3, TOKENS, 2), randn(3, TOKENS, 2, *[40][:channels])
    given = {"beta": beta.to(q.device), "log_decay": logsigmoid(gates + 2).to(q.device)}
    return {"q": q, "k": normalize(k, dim=-1), "v": v, **given}, (2, 40, 70)


def linear(backend, channels=False):
    given, shape = delta(backend, channels)
    del given["beta"]
    given["k"] = torch.cat([given["k"], -given["k"]], 2)
    given["q"] = torch.cat([given["q"], given["q"]], 2)
    return given, shape


def taylor(backend):
    given, _ = linear(backend)
    given["q"], given["k"] = given["q"][..., :9], given["k"][..., :9]
    return given, (2, 1 + 9 + 45, 71)


def conv(backend, columns=3):
    return {"x": randn(3, TOKENS, 20, backend=backend)}, (20, columns)


WEIGHT = torch.linspace(-1, 1, 20 * 4).view(20, 4)
CASES = {
    "delta": (tm.delta_attention_decode, delta, {}),
    "delta, channels": (tm.delta_attention_decode, lambda b: delta(b, True), {"qk_l2norm": True}),
    "linear": (tm.linear_attention_decode, linear, {}),
    "linear, channels": (tm.linear_attention_decode, lambda b: linear(b, True), {}),
    "taylor2": (
        tm.linear_attention_decode, taylor, {"feature_map": "taylor2", "normalize": True},
    ),
    "conv": (tm.causal_conv1d_decode, conv, {"weight": WEIGHT}),
    "conv, four columns": (
        tm.causal_conv1d_decode, lambda b: conv(b, 4), {"weight": WEIGHT, "activation": "silu"},
    ),
    "conv, more columns": (tm.causal_conv1d_decode, lambda b: conv(b, 9), {"weight": WEIGHT}),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def prepare(case, backend):
    """A call(tensors, state, **options), its tensors, and states in five slots."""
    function, make, options = CASES[case]
    tensors, shape = make(backend)
    where = device_of(backend)
    options = {n: t.to(where) if torch.is_tensor(t) else t for n, t in options.items()}

    def call(tensors, state, **more):
        return function(**tensors, state=state, **options, **more, backend=backend)

    return call, tensors, randn(5, *shape, backend=backend)


def same(x, y, backend):
    """In every bit; the reference multiplies matrices of another shape."""
    torch.testing.assert_close(x, y, **({} if backend == "reference" else {"atol": 0, "rtol": 0}))


@each_backend
@each_case
def test_a_draft_has_the_bits_of_a_step_and_changes_no_state(case, backend):
    call, tensors, state = prepare(case, backend)
    before, slots = state.clone(), ints(3, 0, 2, backend=backend)
    drafted = call(tensors, state, state_indices=slots, accepted=ints(0, 0, 0, backend=backend))
    assert torch.equal(state, before)
    same(call(tensors, state, state_indices=slots), drafted, backend)
    assert not torch.equal(state, before)


@each_backend
@each_case
def test_the_state_is_that_after_the_accepted_tokens(case, backend):
    call, tensors, state = prepare(case, backend)
    whole, slots, counts = state.clone(), (4, 1, 0), (2, 0, TOKENS)
    alone = state.clone()
    out = call(
        tensors, state, state_indices=ints(*slots, backend=backend),
        accepted=ints(*counts, backend=backend),
    )  # fmt: skip
    same(out, call(tensors, whole, state_indices=ints(*slots, backend=backend)), backend)
    for request, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        if count > 0:
            part = {n: t[request : request + 1, :count] for n, t in tensors.items()}
            call(part, alone[slot : slot + 1])
    same(state, alone, backend)


@each_backend
@each_case
def test_a_rejected_token_leaves_nothing(case, backend):
    """Not even one whose values are not finite."""
    call, tensors, state = prepare(case, backend)
    for t in tensors.values():
        t[:, 3:] = torch.nan
    alone = state.clone()
    out = call(tensors, state, accepted=ints(3, 1, 3, backend=backend))
    assert out[:, :3].isfinite().all() and out[:, 3:].isnan().all()
    for request, count in enumerate((3, 1, 3)):
        call({n: t[request, None, :count] for n, t in tensors.items()}, alone[request, None])
    same(state, alone, backend)


@each_backend
@each_case
def test_a_skipped_request_accepts_nothing(case, backend):
    call, tensors, state = prepare(case, backend)
    before, none = state.clone(), ints(-1, -1, -1, backend=backend)
    out = call(tensors, state, state_indices=none, accepted=ints(1, 0, TOKENS, backend=backend))
    assert not out.any() and torch.equal(state, before)


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_case
def test_counts_out_of_range_are_clamped(case, backend):
    """On GPUs, where values are not checked."""
    call, tensors, state = prepare(case, backend)
    whole = state.clone()
    counts = ints(-7, TOKENS + 1, 2**31 - 1, backend=backend)
    out = call(tensors, state, accepted=counts)
    counts = ints(0, TOKENS, TOKENS, backend=backend)
    assert torch.equal(call(tensors, whole, accepted=counts), out)
    assert torch.equal(state, whole)


@each_backend
def test_one_call_replays_and_drafts(backend):
    """Two requests of three accepted tokens, one of a token behind two that change nothing."""
    call, tensors, state = prepare("delta", backend)
    tensors["beta"][0, :2] = 0
    tensors["log_decay"][0, :2] = 0
    alone = state.clone()
    out = call(tensors, state, accepted=ints(3, 3, 3, backend=backend))
    for b, first in enumerate((2, 0, 0)):
        part = {n: t[b, None, first:] for n, t in tensors.items()}
        want = call(part, alone[b, None], accepted=ints(3 - first, backend=backend))
        torch.testing.assert_close(out[b, None, first:], want)
    torch.testing.assert_close(state[:3], alone[:3])


@pytest.mark.parametrize("layer", ["GatedDeltaNet", "KimiDeltaAttention", "Mamba2"])
@torch.no_grad()
def test_a_layer_drafts_verifies_and_goes_on(layer):
    """Four drafted tokens at a time, of which none to four are right."""
    torch.manual_seed(0)
    layer = getattr(tm.nn, layer)(64, 2, head_dim=16)
    right, state, done = torch.randn(2, 12, 64), layer.new_state(2), [0, 0]
    want = layer(right)
    outs, rights = [[], []], iter([(0, 4), (3, 1), (4, 2), (1, 4), (4, 1), (4, 4), (4, 4), (4, 4)])
    while min(done) < 12:
        counts = [min(n, 12 - d) for n, d in zip(next(rights), done, strict=True)]
        draft = torch.randn(2, 4, 64)
        for b, n in enumerate(counts):
            draft[b, :n] = right[b, done[b] : done[b] + n]
        y = layer.decode(draft, state, accepted=ints(0, 0))
        layer.decode(draft, state, accepted=ints(*counts))
        for b, n in enumerate(counts):
            outs[b].append(y[b, :n])
            done[b] += n
    torch.testing.assert_close(torch.stack([torch.cat(o) for o in outs]), want)
