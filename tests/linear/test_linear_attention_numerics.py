"""Accuracy of linear attention: long sequences, small weights, NaN."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, each_dtype, each_kernel
from linear_oracle import chunked, inputs, interpreted, relative_error
from strategies import layouts

import tokenmill as tm
from tokenmill import registry
from tokenmill.linear.linear_attention_cases import draw_state
from tokenmill.registry import Sample
from tokenmill.testing import compare

SPEC = registry.get("linear_attention")
MAPS = ("identity", "elu1", "relu", "silu", "taylor2")
INF, NAN = float("inf"), float("nan")

# Interpreters are too slow for long sequences.
each_fast_kernel = pytest.mark.parametrize("backend", [b for b in backends() if not interpreted(b)])
each_map = pytest.mark.parametrize("feature_map", MAPS)


LONG = {  # norm-relative error: out, state, gradients, gradient of the decay
    torch.float32: (1e-5, 1e-5, 1e-5, 1e-4),
    torch.float16: (5e-3, 3e-3, 3e-3, 5e-3),
    torch.bfloat16: (1e-2, 8e-3, 1e-2, 2e-2),
}


@each_fast_kernel
@each_dtype
@pytest.mark.parametrize("gated", [False, True])
def test_out_and_state_after_65536_tokens(gated, dtype, backend):
    length = 65536
    q, k, v = inputs("cpu", length, heads=1, d=16, dv=16, dtype=dtype)
    if gated:
        decay = torch.nn.functional.logsigmoid(torch.randn(1, length, 1) + 4)
    else:
        decay = torch.tensor([-(2.0**-9)])
    got = tm.linear_attention(
        *(t.to(device_of(backend)) for t in (q, k, v)), log_decay=decay.to(device_of(backend)),
        return_final_state=True, backend=backend,
    )  # fmt: skip
    assert got[1].dtype == torch.float32
    for a, b, limit in zip(got, chunked(q, k, v, log_decay=decay), LONG[dtype], strict=False):
        assert relative_error(a.cpu(), b) < limit


@each_fast_kernel
def test_a_state_without_decay_grows_without_drift(backend):
    """Sums 40000 equal terms: a 16-bit state would stop growing."""
    length = 40000
    ones = torch.ones(1, length, 1, 8, dtype=torch.bfloat16, device=device_of(backend))
    out, state = tm.linear_attention(
        ones, ones, ones, scale=0.125, return_final_state=True, backend=backend
    )
    assert torch.all(state == length)
    want = torch.arange(1, length + 1, device=out.device).bfloat16()
    assert torch.equal(out[0, :, 0, 0], want)


@each_fast_kernel
@each_dtype
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_over_long_sequences(gated, dtype, backend):
    """The sum of t (k.dk - q.dq) over a whole sequence cancels, but chunks must not. Results are
    their own cotangents: then the parts of a decay's gradient add up, and a relative limit is
    fair."""
    length = 4096 + 63
    q, k, v = inputs("cpu", length, heads=2, d=16, dv=24, dtype=dtype)
    if gated:
        decay = torch.nn.functional.logsigmoid(torch.randn(1, length, 2) + 3)
    else:
        decay = torch.tensor([-0.003, -0.9])
    state = torch.randn(1, 2, 16, 24)
    weights = chunked(q, k, v, log_decay=decay, initial_state=state)

    def gradients(function, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        results = function(*leaves)
        return torch.autograd.grad(
            results, leaves, [w.to(r) for w, r in zip(weights, results, strict=True)]
        )

    def ours(q, k, v, decay, state):
        return tm.linear_attention(
            q, k, v, log_decay=decay, initial_state=state, return_final_state=True, backend=backend
        )

    def theirs(q, k, v, decay, state):
        return chunked(q, k, v, log_decay=decay, initial_state=state)

    tensors = (q, k, v, decay, state)
    found = gradients(ours, [t.to(device_of(backend)) for t in tensors])
    wanted = gradients(theirs, [t.double() for t in tensors])
    limits = [LONG[dtype][2]] * 5
    limits[3] = LONG[dtype][3]
    names = ["q", "k", "v", "decay", "state"]
    for name, a, b, limit in zip(names, found, wanted, limits, strict=True):
        assert relative_error(a.cpu(), b) < limit, name


@each_backend
def test_the_gradient_of_slopes_is_the_slope_of_the_loss(backend):
    q, k, v = inputs(backend, 150, d=8)
    weights = torch.randn(1, 150, 2, 16, device=q.device)
    slopes = torch.tensor([0.02, 0.6], device=q.device, requires_grad=True)
    loss = (tm.lightning_attention(q, k, v, slopes, backend=backend) * weights).sum()
    (got,) = torch.autograd.grad(loss, slopes)
    step = 1e-5

    def at(change):
        wide = [t.double() for t in (q, k, v, slopes.detach() + change)]
        out = tm.lightning_attention(*wide, backend="reference")
        return (out * weights.double()).sum().item()

    for h in range(2):
        change = torch.zeros(2, dtype=torch.float64, device=q.device)
        change[h] = step
        want = (at(change) - at(-change)) / (2 * step)
        assert got[h].item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("backend", "isa"), [v for v in cpu_variants() if v[0] == "cpu"], indirect=["isa"], ids=str
)
def test_the_gradient_of_steep_decays_is_a_sum_of_pairs(backend, isa, gated):
    """Sums over tokens of differences q.dq - k.dk reached six times the error budget here: only
    adjacent pairs have weight, and their sum may be almost 0."""

    def make(dtype, g):
        q, k, v = (layouts((63, 2, 1), dtype, g)[i]() for i in (1, 2, 0))
        decay = -20 * torch.rand((63, 2) if gated else 2, generator=g)
        wide = torch.promote_types(dtype, torch.float32)
        state = draw_state((2, 2, 1, 1), "identity", False, dtype, g)
        options = {"log_decay": decay.to(wide), "initial_state": state}
        return (q, k, v), options | {"cu_seqlens": torch.tensor([0, 0, 63], dtype=torch.int32)}

    for seed in (11, 39, 56, 59):
        found = compare(SPEC, Sample("steep", make), backend, torch.float32, seed=seed)
        assert not [c for c in found if not c.ok], seed


@each_backend
@pytest.mark.parametrize("feature_map", ["elu1", "taylor2"])
@each_dtype
def test_normalized_weights_sum_to_one(feature_map, dtype, backend):
    """With V = 1, z is accurate relative to its size."""
    q, k, _ = inputs(backend, 100, d=16, dtype=dtype)
    v = torch.ones(1, 100, 2, 3, dtype=dtype, device=q.device)
    gate = -torch.rand(1, 100, 2, device=q.device)
    out = tm.linear_attention(
        q, k, v, feature_map=feature_map, normalize=True, log_decay=gate, backend=backend
    )
    limit = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert (out.double() - 1).abs().max() < limit


@each_backend
def test_small_features_keep_their_digits(backend):
    """elu(x) + 1 is e^x for x < 0: computed as a difference it would have no digit left at -17."""
    for x in (-5.0, -12.0, -17.0, -30.0):
        q = torch.full((1, 3, 1, 4), x, device=device_of(backend))
        v = torch.ones_like(q)
        out = tm.linear_attention(q, q, v, feature_map="elu1", scale=1.0, backend=backend)
        want = torch.arange(1, 4) * 4 * math.exp(2 * x)
        torch.testing.assert_close(out[0, :, 0, 0].cpu().double(), want.double(), rtol=1e-5, atol=0)


@each_kernel
@each_dtype
def test_the_chunk_size_changes_rounding_alone(dtype, backend):
    q, k, v = inputs(backend, 70 if interpreted(backend) else 300,
                     dtype=dtype)  # fmt: skip
    decay = torch.tensor([-0.01, -1.5], device=q.device)
    results = [
        tm.linear_attention(
            q, k, v, log_decay=decay, chunk_size=c, return_final_state=True, backend=backend
        )
        for c in (None, 16, 32, 64, 128, 256)
    ]
    out, state = chunked(q, k, v, log_decay=decay)
    for got in results:
        assert relative_error(got[0], out) < LONG[dtype][0]
        assert relative_error(got[1], state) < LONG[dtype][1]


@each_backend
@each_map
def test_derivatives_of_the_features_of_zero(feature_map, backend):
    """This includes the kinks of elu1 and relu. The key is 1 for maps whose features of 0 are 0."""
    q = torch.zeros(1, 1, 1, 4, device=device_of(backend), requires_grad=True)
    positive = feature_map in ("elu1", "taylor2")
    k = (q.detach() if positive else torch.ones_like(q)).requires_grad_()
    v = torch.ones_like(q)
    out = tm.linear_attention(q, k, v, feature_map=feature_map, scale=0.25, backend=backend)
    dq, dk = torch.autograd.grad(out, (q, k), torch.ones_like(out))
    sigmoid = 1 / (1 + math.exp(-1))
    slope = {"identity": 1.0, "elu1": 1.0, "relu": 0.0, "silu": 0.5 * sigmoid, "taylor2": 0.0}
    assert torch.allclose(dq, torch.full_like(dq, slope[feature_map]), atol=1e-6)
    assert torch.allclose(dk, torch.full_like(dk, 1.0 if feature_map == "elu1" else 0.0), atol=1e-6)


@each_backend
@each_map
def test_nan_stays_where_it_is(feature_map, backend):
    length, j = 300, 290
    if interpreted(backend):
        length, j = 290, 282
    options = {"feature_map": feature_map, "return_final_state": True, "backend": backend}
    for which in range(3):
        tensors = inputs(backend, length, heads=1, d=4, dv=4)
        tensors[which][0, j, 0, 1] = NAN
        out, state = tm.linear_attention(*tensors, **options)
        rows = torch.isnan(out[0, :, 0]).any(-1)
        if which == 0:
            assert rows.nonzero().flatten().tolist() == [j]
            assert torch.isfinite(state).all()
        else:
            # A kernel's chunk has at most 256 tokens.
            assert rows[j:].all() and not rows[: j - 256].any()
            assert torch.isnan(state).any()


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
def test_every_instruction_set_over_tile_borders(backend, isa):
    length = 40 if interpreted(backend) else 333
    sample = registry.Sample(
        "long",
        lambda dtype, g: (
            tuple(
                torch.randn(1, length, heads, d, generator=g).to(dtype)
                for heads, d in ((4, 40), (2, 40), (2, 72))
            ),
            {"log_decay": -torch.rand(4, generator=g), "return_final_state": True},
        ),
    )
    for dtype in (torch.float32, torch.bfloat16):
        found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
        assert not [c for c in found if not c.ok]
