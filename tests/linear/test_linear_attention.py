"""Properties and regressions of linear_attention and lightning_attention."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backends, device_of
from each import each_backend, each_dtype, each_kernel, randn
from hypothesis import given
from hypothesis import strategies as st
from linear_oracle import chunked, close, inputs, interpreted
from strategies import linear_samples
from tier import examples

import tokenmill as tm
from tokenmill import registry
from tokenmill.reference.linear import linear_attention as reference
from tokenmill.registry import Sample
from tokenmill.testing import compare, convert, error, evaluate, magnitude, oracle

SPEC = registry.get("linear_attention")
MAPS = ("identity", "elu1", "relu", "silu", "taylor2")
INF, NAN = float("inf"), float("nan")

# Interpreters are too slow for long sequences.
each_fast_kernel = pytest.mark.parametrize("backend", [b for b in backends() if not interpreted(b)])
each_map = pytest.mark.parametrize("feature_map", MAPS)


# --- two ways to the same numbers ---------------------------------------------------------------


@examples(60)
@given(sample=linear_samples(max_length=65))
def test_the_recurrence_is_the_matrix_of_weights(sample):
    args, kwargs = convert(
        sample.make(torch.float64, torch.Generator().manual_seed(0)), torch.float64
    )
    first = evaluate(oracle("linear_attention"), args, kwargs)[0]
    cotangents = [torch.randn_like(r) for r in first]
    many = len(first)

    def quadratic(*args, **kwargs):
        return reference.linear_attention_quadratic(SPEC.record(*args, **kwargs))[:many]

    ours = evaluate(oracle("linear_attention"), args, kwargs, cotangents)
    theirs = evaluate(quadratic, args, kwargs, cotangents)
    for a, b in zip(ours[0], theirs[0], strict=True):
        close(a, b, 1e-11)
    # A gradient may be a small remainder of terms as large as the other gradients: dq of one token
    # and eps.
    unit = max((magnitude(b) for b in theirs[1]), default=0.0)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert error(a, b, unit) < 1e-11


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(70)
@given(sample=linear_samples())
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype)
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_dtype
@examples(5)
@given(sample=linear_samples(max_length=40))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length, dim", [(16, 1), (16, 16), (40, 32)])
def test_the_gradient_of_a_decay_beside_the_final_state(length, dim, dtype, backend):
    """What the final state adds to the gradients of keys cancels in the gradient of the decay: its
    rounding to 16 bits does not."""

    def make(dtype, g):
        q, k, v = (torch.randn(1, length, 1, dim, generator=g).to(dtype) for _ in range(3))
        wide = torch.promote_types(dtype, torch.float32)
        decay = -(0.5 * torch.rand(1, generator=g)).to(wide)
        return (q, k, v), {"log_decay": decay, "return_final_state": True}

    sample = Sample(f"{length} tokens, dim {dim}", make)
    for seed in range(6):
        found = compare(SPEC, sample, backend, dtype, device=device_of(backend), seed=seed)
        assert not [c for c in found if not c.ok]


@each_backend
def test_taylor2_weighs_with_the_series_of_the_exponential(backend):
    q, k, v = inputs(backend, 70, d=12, dv=20)
    u = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(12)
    weights = (1 + u + u * u / 2).tril()
    want = torch.einsum("bhij,bjhe->bihe", weights, v.double())
    close(tm.linear_attention(q, k, v, feature_map="taylor2", backend=backend), want)
    want = want / (weights.sum(-1) + 1e-6).transpose(1, 2)[..., None]
    options = {"feature_map": "taylor2", "normalize": True, "backend": backend}
    close(tm.linear_attention(q, k, v, **options), want)


@each_backend
def test_the_state_of_taylor2_does_not_depend_on_the_scale(backend):
    q, k, v = inputs(backend, 20, d=3)
    states = [
        tm.linear_attention(
            q, k, v, feature_map="taylor2", scale=s, return_final_state=True, backend=backend
        )[1]
        for s in (0.1, 2.0)
    ]
    assert torch.equal(*states)
    kd, vd = k.double(), v.double()
    pairs = [kd[..., i] * kd[..., j] for i in range(3) for j in range(i, 3)]
    features = torch.stack([torch.ones_like(kd[..., 0]), *kd.unbind(-1), *pairs], -1)
    close(states[0], torch.einsum("bthf,bthe->bhfe", features, vd))


# --- decay and time -----------------------------------------------------------------------------


@each_backend
def test_lightning_attention_is_linear_attention(backend):
    q, k, v = inputs(backend, 40)
    slopes = torch.tensor([0.0, 0.7], device=q.device)
    got = tm.lightning_attention(q, k, v, slopes, return_final_state=True, backend=backend)
    want = tm.linear_attention(
        q, k, v, log_decay=-slopes, scale=1.0, return_final_state=True, backend=backend
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_lightning_attention_names_the_slopes():
    q, k, v = inputs("cpu", 4)
    with pytest.raises(
        tm.InputError, match="lightning_attention: slopes: must not be negative; least"
    ):
        tm.lightning_attention(q, k, v, torch.tensor([0.5, -0.25]))
    with pytest.raises(tm.InputError, match=r"slopes: must have shape \[2\]; got \[1, 4, 2\]"):
        tm.lightning_attention(q, k, v, torch.zeros(1, 4, 2))
    with pytest.raises(tm.InputError, match=r"slopes: must be a tensor; got 0.5"):
        tm.lightning_attention(q, k, v, 0.5)
    with pytest.raises(tm.InputError, match=r"slopes: must be float32; got int64"):
        tm.lightning_attention(q, k, v, torch.zeros(2, dtype=torch.int64))


@each_backend
@pytest.mark.parametrize("slope", [0.0, 0.05, 1.0, 7.875, 20.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 191, 193])
def test_exponents_at_every_tail(length, slope, backend):
    """Unmasked exponents of rows past the tail would overflow for slopes of 1.4 and above."""
    q, k, v = inputs(backend, length, heads=1, d=8, dv=8)
    state = randn(1, 1, 8, 8, backend=backend)
    log_decay = torch.full((1,), -slope, device=q.device)
    options = {"log_decay": log_decay, "initial_state": state}
    got = tm.linear_attention(q, k, v, **options, return_final_state=True, backend=backend)
    for a, b in zip(got, chunked(q, k, v, **options), strict=True):
        assert torch.isfinite(a).all()
        close(a, b)


@each_backend
@pytest.mark.parametrize("gated", [False, True])
def test_one_token_with_history_decays_the_history(gated, backend):
    """The state decays before the token is added; vLLM's prefill multiplies it by e^0."""
    q, k, v = inputs(backend, 1)
    state = randn(1, 2, 16, 16, backend=backend)
    decay = torch.tensor([-0.5, -3.0], device=q.device)
    shaped = decay.expand(1, 1, 2) if gated else decay
    got, after = tm.linear_attention(
        q, k, v, log_decay=shaped, initial_state=state, return_final_state=True, backend=backend
    )
    new = torch.exp(decay)[:, None, None] * state + k[:, 0, :, :, None] * v[:, 0, :, None, :]
    close(after, new)
    close(got[:, 0], torch.einsum("bhd,bhde->bhe", q[:, 0], new) / 4)
    stepped = state.clone()
    step = tm.linear_attention_decode(q, k, v, stepped, log_decay=shaped, backend=backend)
    close(got, step)
    close(after, stepped)


@each_backend
@each_map
@examples(6)
@given(length=st.integers(0, 150), data=st.data())
def test_cut_anywhere_and_continued(feature_map, backend, length, data):
    cut = data.draw(st.integers(0, length))
    if interpreted(backend):
        length, cut = length // 4, cut // 4
    q, k, v = inputs(backend, length, d=6)
    gate = -torch.rand(1, length, 2).to(q.device)
    options = {"feature_map": feature_map, "normalize": feature_map in ("elu1", "taylor2")}
    options |= {"return_final_state": True, "backend": backend}
    whole, end = tm.linear_attention(q, k, v, log_decay=gate, **options)
    first, state = tm.linear_attention(
        *(t[:, :cut] for t in (q, k, v)), log_decay=gate[:, :cut], **options
    )
    rest, last = tm.linear_attention(
        *(t[:, cut:] for t in (q, k, v)), log_decay=gate[:, cut:], initial_state=state, **options
    )
    close(torch.cat([first, rest], 1), whole)
    close(last, end)


@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cuda", "emulated")])
@pytest.mark.parametrize("tokens", [0, 3, 300])
def test_packed_rows_without_sequences_see_nothing(tokens, backend):
    """The values of cu_seqlens are not checked here."""
    leaves = [randn(tokens, 2, 8, backend=backend).requires_grad_() for _ in range(3)]
    decay = -torch.rand(tokens, 2, device=leaves[0].device)
    cu = torch.zeros(1, dtype=torch.int32, device=decay.device)
    options = {"log_decay": decay.requires_grad_(), "cu_seqlens": cu, "backend": backend}
    for normalize in (False, True):
        out = tm.linear_attention(*leaves, normalize=normalize, **options)
        assert torch.equal(out, torch.zeros_like(out))
        for gradient in torch.autograd.grad(out.sum(), [*leaves, decay]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@each_backend
@pytest.mark.parametrize("gated", [False, True])
def test_packed_sequences_are_separate_calls(gated, backend):
    lengths = [70, 0, 1, 64]
    total, heads = sum(lengths), 2
    q, k, v = (t[0] for t in inputs(backend, total))
    state = randn(4, heads, 16, 16, backend=backend)
    shape = (total, heads) if gated else (heads,)
    log_decay = -torch.rand(shape).to(q.device)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out, final = tm.linear_attention(
        q, k, v, log_decay=log_decay, initial_state=state, return_final_state=True,
        cu_seqlens=ends.to(q.device), backend=backend,
    )  # fmt: skip
    for n, (a, b) in enumerate(zip(ends.tolist(), ends.tolist()[1:], strict=False)):
        alone, after = tm.linear_attention(
            *(t[None, a:b] for t in (q, k, v)),
            log_decay=log_decay[None, a:b] if gated else log_decay,
            initial_state=state[n : n + 1], return_final_state=True, backend=backend,
        )  # fmt: skip
        close(out[a:b], alone[0])
        close(final[n : n + 1], after)
    assert torch.equal(final[1], state[1])


@each_backend
def test_heads_in_groups_are_repeated_heads(backend):
    q, k, v = (t.requires_grad_() for t in inputs(backend, 66, heads=6, kv_heads=2))
    decay = -torch.rand(6).to(q.device)
    wide = [t.detach().repeat_interleave(3, 2).requires_grad_() for t in (k, v)]
    got = tm.linear_attention(q, k, v, log_decay=decay, backend=backend)
    want = tm.linear_attention(q, *wide, log_decay=decay, backend=backend)
    close(got, want)
    weights = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (k, v), weights),
        torch.autograd.grad(want, wide, weights),
        strict=True,
    ):
        close(a, b.unflatten(2, (2, 3)).sum(3))


@each_backend
@pytest.mark.parametrize("gated", [False, True])
def test_minus_infinity_forgets_everything(gated, backend):
    q, k, v = (t.requires_grad_() for t in inputs(backend, 90))
    state = randn(1, 2, 16, 16, backend=backend).requires_grad_()
    if gated:
        decay = -torch.rand(1, 90, 2)
        decay[:, 37] = decay[:, 38] = decay[:, 70, 1] = -INF
    else:
        decay = torch.tensor([-INF, -0.3])
    decay = decay.to(q.device).requires_grad_()
    leaves = (q, k, v, decay, state)
    got = tm.linear_attention(
        q, k, v, log_decay=decay, initial_state=state, return_final_state=True, backend=backend
    )
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = tm.linear_attention(
        *wide[:3], log_decay=wide[3], initial_state=wide[4], return_final_state=True,
        backend="reference",
    )  # fmt: skip
    weights = [torch.randn_like(t) for t in got]
    found = [*got, *torch.autograd.grad(got, leaves, weights)]
    wanted = [*want, *torch.autograd.grad(want, wide, [w.double() for w in weights])]
    for a, b in zip(found, wanted, strict=True):
        assert torch.isfinite(a).all()
        close(a, b, 1e-4)


@each_backend
def test_decays_that_underflow_leave_the_token_itself(backend):
    q, k, v = inputs(backend, 80)
    decay = torch.tensor([-200.0, -1e30], device=q.device)
    got, state = tm.linear_attention(
        q, k, v, log_decay=decay, return_final_state=True, backend=backend
    )
    close(got, (q * k).sum(-1, keepdim=True) / 4 * v)
    close(state, k[:, -1, :, :, None] * v[:, -1, :, None, :])


# --- writing into out, and what autograd sees ---------------------------------------------------


@each_backend
def test_out_is_written_and_returned(backend):
    q, k, v = inputs(backend, 35)
    decay = torch.tensor([-0.1, -0.2], device=q.device)
    want, state = tm.linear_attention(
        q, k, v, log_decay=decay, return_final_state=True, backend=backend
    )
    around = torch.full((1, 35, 2, 20), 7.0, device=q.device)
    out = around[..., 2:18]
    got, final = tm.linear_attention(
        q, k, v, log_decay=decay, return_final_state=True, out=out, backend=backend
    )
    assert got is out and torch.equal(out, want) and torch.equal(final, state)
    assert torch.all(around[..., :2] == 7) and torch.all(around[..., 18:] == 7)
    assert tm.lightning_attention(q, k, v, -decay, out=out, backend=backend) is out


@each_kernel
def test_sugar_and_out_compile_as_one_graph(backend):
    q, k, v = inputs(backend, 20)
    slopes = torch.tensor([0.1, 0.3], device=q.device)

    def run(q, k, v, slopes):
        out = torch.empty_like(v)
        tm.lightning_attention(q, k, v, slopes, out=out, backend=backend)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, slopes), run(q, k, v, slopes))


def test_the_state_of_a_float64_call_is_float64():
    q, k, v = (t.double() for t in inputs("cpu", 4))
    with pytest.raises(tm.InputError, match="initial_state: must be float64; got float32"):
        state = torch.zeros(1, 2, 16, 16)
        tm.linear_attention(q, k, v, initial_state=state, backend="reference")


@each_backend
def test_out_has_no_gradient(backend):
    q, k, v = inputs(backend, 5)
    out = torch.empty_like(v)
    q.requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"q: must not require a gradient, as the call writes into"
    ):
        tm.linear_attention(q, k, v, out=out, backend=backend)
    with torch.no_grad():
        want = tm.linear_attention(q, k, v, backend=backend)
        assert torch.equal(tm.linear_attention(q, k, v, out=out, backend=backend), want)
    before = out._version
    tm.linear_attention(q.detach(), k, v, out=out, backend=backend)
    assert out._version > before


@each_backend
@pytest.mark.parametrize("which", ["out", "state"])
@pytest.mark.parametrize("needs", [(0,), (2,), (3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_gradients_of_either_result_alone(needs, which, backend):
    tensors = inputs(backend, 40)
    tensors += [torch.tensor([-0.1, -0.4]).to(tensors[0].device), randn(1, 2, 16, 16)]
    tensors[4] = tensors[4].to(tensors[0].device)

    def gradients(dtype, backend):
        leaves = [t.detach().to(dtype) for t in tensors]
        wanted = [leaves[i].requires_grad_() for i in needs]
        q, k, v, decay, state = leaves
        results = tm.linear_attention(
            q, k, v, log_decay=decay, initial_state=state, return_final_state=True, backend=backend
        )
        result = results[which == "state"]
        weights = torch.linspace(-1, 1, result.numel(), dtype=dtype, device=q.device)
        # The state does not depend on queries.
        loss = (result * weights.view_as(result)).sum() + sum(w.sum() * 0 for w in wanted)
        return torch.autograd.grad(loss, wanted)

    for a, b in zip(gradients(torch.float32, backend), gradients(torch.float64, "reference"),
                    strict=True):  # fmt: skip
        close(a, b, 1e-5)


@each_kernel
def test_the_normalizer_has_no_gradient_of_its_own(backend):
    q, k, v = (t.requires_grad_() for t in inputs(backend, 8))
    lowered = SPEC.lower(q, k, v, feature_map="elu1", normalize=True)
    out, _, normalizer = SPEC.forward.run(tm._call.choose.namespace(backend), lowered)
    assert out.requires_grad and not normalizer.requires_grad
