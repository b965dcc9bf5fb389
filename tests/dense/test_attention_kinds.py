"""attention with kinds that use the logit itself, and with normalize."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import DTYPES, each_backend, each_dtype, each_kernel, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import attention_samples
from test_attention import INF, NAN, SPEC
from tier import examples

import tokenmill as tm
from tokenmill import registry
from tokenmill.testing import compare, error

KINDS = ("relu", "elu1", "linear", "taylor2")
NORMALIZERS = (None, "sum", "count")
FORMS = [(k, n) for k in (*KINDS, "sigmoid") for n in NORMALIZERS if (k, n) != ("sigmoid", None)]
# Each score map and each normalizer once, for slow calls.
FEW = [("relu", "count"), ("elu1", "sum"), ("linear", "sum"), ("taylor2", None), ("sigmoid", "sum")]
INTERPRETERS = [b for b in ("triton", "emulated") if device_of(b) == "cpu"]


def each_form(*others):
    return pytest.mark.parametrize(
        ("kind", "normalize", "backend"),
        [
            pytest.param(kind, normalize, backend, id=f"{kind}-{normalize}-{backend}")
            for backend in backends(*others)
            for kind, normalize in (FEW if backend in INTERPRETERS else FORMS)
        ],
    )


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(60)
@given(sample=attention_samples(kinds=(*KINDS, "sigmoid"), normalizers=NORMALIZERS))
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype)
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@examples(5)
@given(sample=attention_samples(40, kinds=(*KINDS, "sigmoid"), normalizers=NORMALIZERS))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


LONG = [
    registry.Sample(
        f"{kind}-{normalize}-{options}",
        lambda dtype, g, kind=kind, normalize=normalize, options=options: (
            (
                torch.randn(1, 400, 2, 40, generator=g).to(dtype),
                torch.randn(1, 700, 1, 40, generator=g).to(dtype),
                torch.randn(1, 700, 1, 72, generator=g).to(dtype),
            ),
            {"kind": kind, "normalize": normalize, **options},
        ),
    )
    for kind, normalize, options in (
        ("relu", "count", {"causal": True}),
        ("elu1", "sum", {"return_lse": True}),
        ("linear", "sum", {"window": (130, 5), "return_lse": True}),
        ("taylor2", None, {"causal": True}),
    )
]


@pytest.mark.parametrize("isa", [i for b, i in cpu_variants() if b == "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", LONG, ids=lambda sample: sample.name)
def test_long_sequences_cross_every_tile_border(sample, dtype, isa):
    assert not [c for c in compare(SPEC, sample, "cpu", dtype) if not c.ok]


# --- a second oracle --------------------------------------------------------------------------


def literally(q, k, v, kind, normalize, hidden):
    """The formulas of the papers, heads first; returns out and the sum or count of each row."""
    z = q @ k.mT / math.sqrt(q.shape[-1])
    f = {
        "relu": torch.nn.functional.relu,
        "elu1": lambda x: torch.nn.functional.elu(x) + 1,
        "linear": lambda x: x,
        "taylor2": lambda x: 1 + x + x**2 / 2,
        "sigmoid": torch.nn.functional.sigmoid,
    }[kind](z) * ~hidden
    if normalize is None:
        return f @ v, None
    if normalize == "count":
        n = (~hidden).sum(-1, keepdim=True)
        return f / n.clamp(min=1) @ v, n
    s = f.sum(-1, keepdim=True)
    return f / (s.abs().clamp(min=1) if kind == "linear" else s + 1e-8) @ v, s


@each_form("reference")
def test_forms_are_what_the_papers_say(kind, normalize, backend):
    """Grouped heads, a causal mask and a boolean mask; values and gradients of all inputs."""
    q, k, v = (randn(2, 11, h, d).requires_grad_() for h, d in ((4, 8), (2, 8), (2, 6)))
    shown = torch.rand(2, 1, 11, 11) < 0.8
    hidden = ~shown | torch.ones(11, 11, dtype=torch.bool).triu(1)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    first = [t.transpose(1, 2) for t in wide]
    repeated = [first[0], *(t.repeat_interleave(2, 1) for t in first[1:])]
    want, s = literally(*repeated, kind, normalize, hidden)
    want = want.transpose(1, 2)
    leaves = [t.detach().to(device_of(backend)).requires_grad_() for t in (q, k, v)]
    options = {"kind": kind, "normalize": normalize, "causal": True, "backend": backend}
    got = tm.attention(
        *leaves, bias=shown.to(device_of(backend)), return_lse=normalize == "sum", **options
    )
    results, wanted = (got, (want, s.squeeze(-1))) if normalize == "sum" else ((got,), (want,))
    cotangents = [torch.randn(w.shape) for w in wanted]
    for a, b in zip(results, wanted, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)
    moved = [c.to(device_of(backend)) for c in cotangents]
    for a, b in zip(
        torch.autograd.grad(results, leaves, moved),
        torch.autograd.grad(wanted, wide, [c.double() for c in cotangents]),
        strict=True,
    ):
        assert error(a.cpu(), b) < 1e-5


# --- the degenerate table ---------------------------------------------------------------------


@each_form("reference")
def test_a_row_that_sees_nothing_is_zero(kind, normalize, backend):
    """The keys are hidden by the causal mask, or by a bias."""
    q, k = (randn(1, n, 2, 16, backend=backend) for n in (5, 2))
    bias = torch.zeros(2, 5, 1, device=q.device)
    bias[1] = -INF
    leaves = [t.requires_grad_() for t in (q, k, k.clone(), bias)]
    options = {"kind": kind, "normalize": normalize, "causal": True, "backend": backend}
    out = tm.attention(*leaves[:3], bias=bias, return_lse=normalize == "sum", **options)
    if normalize == "sum":
        out, s = out
        assert torch.all(s[..., :3] == 0) and torch.all(s[:, 1] == 0)
    assert torch.all(out[:, :3] == 0) and torch.all(out[:, :, 1] == 0)
    dq, *others = torch.autograd.grad(out.sum(), leaves)
    assert torch.all(dq[:, :3] == 0) and dq[:, :, 1].abs().max() < 1e-20
    assert all(torch.isfinite(g).all() for g in (dq, *others))


@each_backend
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_dimensions(shape, backend):
    b, sq, sk = shape
    q = randn(b, sq, 4, 8, backend=backend).requires_grad_()
    k, v = (randn(b, sk, 2, d, backend=backend).requires_grad_() for d in (8, 6))
    for kind, normalize in (("taylor2", "sum"), ("linear", "count"), ("elu1", None)):
        out = tm.attention(q, k, v, kind=kind, normalize=normalize, backend=backend)
        assert out.shape == (b, sq, 4, 6) and torch.all(out == 0)
        for grad in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
            assert torch.all(grad == 0)
    s = tm.attention(q, k, v, kind="elu1", normalize="sum", return_lse=True, backend=backend)[1]
    assert s.shape == (b, 4, sq) and torch.all(s == 0)


@each_form("reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_mask_hides_may_hold_anything(kind, normalize, dtype, backend):
    q, k, v = (randn(1, 40, 2, 24, dtype=dtype, backend=backend) for _ in range(3))
    options = {"kind": kind, "normalize": normalize, "causal": True, "backend": backend}
    clean = tm.attention(q, k, v, **options)
    for value in (NAN, INF):
        later = [t.clone() for t in (k, v)]
        for t in later:
            t[:, 29:, :, ::3] = value
        out = tm.attention(q, *later, **options)
        if backend in ("triton", "reference"):  # results may differ by one bit
            torch.testing.assert_close(out[:, :29], clean[:, :29])
        else:
            assert torch.equal(out[:, :29], clean[:, :29])
        assert not out[:, 29:].isfinite().all()


@each_form("reference")
def test_nan_in_a_query_stays_in_its_row(kind, normalize, backend):
    q, k, v = (randn(1, 13, 2, 8, backend=backend) for _ in range(3))
    q[0, 5, 1, 3] = NAN
    out = tm.attention(q, k, v, kind=kind, normalize=normalize, backend=backend)
    bad = torch.isnan(out).all(-1)
    assert bad[0, 5, 1] and bad.sum() == 1 and torch.isnan(out).any(-1).sum() == 1


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b in ("cpu", "reference")])
def test_a_weight_of_zero_hides_its_value(backend):
    """relu makes many zero weights. A GPU multiplies all values that a row sees."""
    q = torch.ones(1, 1, 1, 4, device=device_of(backend))
    k = torch.tensor([1.0, -1.0, 2.0], device=q.device)[None, :, None, None].expand(1, 3, 1, 4)
    v = torch.tensor([3.0, NAN, 5.0], device=q.device)[None, :, None, None]
    out = tm.attention(q, k.contiguous(), v, kind="relu", scale=0.25, backend=backend)
    assert out.item() == 13


@each_form("reference")
def test_derivatives_at_a_logit_of_zero(kind, normalize, backend):
    """The derivative of relu at 0 is the one from the right."""
    if normalize == "sum" and kind == "relu":
        return  # 1e8 because its row sum is 0
    q, k = (torch.zeros(1, 1, 1, 4, device=device_of(backend)) for _ in range(2))
    v = torch.ones(1, 1, 1, 1, device=q.device)
    bias = torch.zeros(1, 1, device=q.device, requires_grad=True)
    out = tm.attention(q, k, v, kind=kind, normalize=normalize, bias=bias, backend=backend)
    (slope,) = torch.autograd.grad(out, bias)
    want = 0.25 if kind == "sigmoid" else 1.0
    # A single weight divided by itself is 1 for any logit.
    want = 0.0 if normalize == "sum" and kind != "linear" else want
    assert slope.item() == pytest.approx(want, abs=1e-6)


@each_backend
@pytest.mark.parametrize("logit", [1.0, -1.0])
def test_a_sum_of_one_does_not_divide(logit, backend):
    """Weights of either sign are divided by max(|sum|, 1): at a sum of 1 by the constant."""
    q, k = (torch.zeros(1, 1, 1, 4, device=device_of(backend)) for _ in range(2))
    v = torch.ones(1, 1, 1, 1, device=q.device)
    bias = torch.full((1, 1), logit, device=q.device, requires_grad=True)
    out = tm.attention(q, k, v, kind="linear", normalize="sum", bias=bias, backend=backend)
    (slope,) = torch.autograd.grad(out, bias)
    assert (out.item(), slope.item()) == (logit, 1.0)


# --- identities -------------------------------------------------------------------------------


@each_backend
@examples(8)
@given(
    left=st.integers(-1, 9), right=st.integers(-1, 9), sq=st.integers(1, 12), sk=st.integers(1, 12)
)
def test_counts_are_of_the_keys_that_a_query_sees(left, right, sq, sk, backend):
    """With logits of 1, values of 1 and a few keys hidden by a bias, each row averages to 1."""
    q, k = (torch.zeros(1, n, 1, 4, device=device_of(backend)) for n in (sq, sk))
    v = torch.ones(1, sk, 1, 3, device=q.device)
    bias = torch.zeros(sk, device=q.device)
    bias[::3] = -INF
    out = tm.attention(
        *(q, k, v), kind="linear", normalize="count", score_bias=1.0, bias=bias,
        window=(left, right), backend=backend,
    )  # fmt: skip
    for i in range(sq):
        own = i + sk - sq
        first = max(own - left, 0) if left >= 0 else 0
        last = min(own + right, sk - 1) if right >= 0 else sk - 1
        seen = [j for j in range(first, last + 1) if j % 3]
        torch.testing.assert_close(out[0, i], torch.full_like(out[0, i], float(bool(seen))))


@each_backend
@pytest.mark.parametrize("kind", [*KINDS, "sigmoid"])
@examples(6)
@given(cut=st.integers(0, 30))
def test_parts_of_the_keys_merge_to_the_whole(cut, kind, backend):
    """Numerators and row sums add up, and so do unnormalized weights."""
    q, k, v = (randn(1, 30, 2, 8, backend=backend) for _ in range(3))
    slices = (slice(0, cut), slice(cut, 30))
    options = {"kind": kind, "backend": backend}
    parts = torch.stack([tm.attention(q, k[:, s], v[:, s], **options) for s in slices])
    merged, _ = tm.merge_attention_states(parts, backend=backend)
    torch.testing.assert_close(merged, tm.attention(q, k, v, **options), rtol=1e-5, atol=1e-5)
    options |= {"normalize": "sum", "return_lse": True}
    found = [tm.attention(q, k[:, s], v[:, s], **options) for s in slices]
    out, s = tm.attention(q, k, v, **options)
    sums = sum(part for _, part in found)
    torch.testing.assert_close(sums, s, rtol=1e-5, atol=1e-5)

    def divisor(s):
        s = s.transpose(1, 2)[..., None]
        return s.abs().clamp(min=1) if kind == "linear" else s + 1e-8

    numerator = sum(o * divisor(part) for o, part in found)
    torch.testing.assert_close(numerator / divisor(sums), out, rtol=1e-4, atol=1e-4)


@each_form("reference")
def test_packed_equals_each_sequence_alone(kind, normalize, backend):
    lengths_q, lengths_k = [4, 0, 11, 7], [9, 3, 0, 7]
    q = randn(sum(lengths_q), 4, 8, backend=backend)
    k, v = (randn(sum(lengths_k), 2, 8, backend=backend) for _ in range(2))
    cu_q, cu_k = (
        torch.tensor([0, *n]).cumsum(0).to(torch.int32).to(q.device) for n in (lengths_q, lengths_k)
    )
    options = {"kind": kind, "normalize": normalize, "causal": True, "backend": backend}
    options |= {"score_bias": 0.5, "return_lse": normalize == "sum"}
    found = tm.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    out, s = found if normalize == "sum" else (found, None)
    for b in range(4):
        rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = tm.attention(q[None, rows], k[None, columns], v[None, columns], **options)
        torch.testing.assert_close(out[rows], (alone if s is None else alone[0])[0])
        if s is not None:
            torch.testing.assert_close(s[:, rows], alone[1][0])


@each_kernel
@pytest.mark.parametrize("kind", [*KINDS, "sigmoid"])
def test_row_sums_alone_can_be_differentiated(kind, backend):
    q, k, v = (randn(1, 11, 2, 8, backend=backend).requires_grad_() for _ in range(3))
    options = {"kind": kind, "normalize": "sum", "return_lse": True}
    _, s = tm.attention(q, k, v, backend=backend, **options)
    got = torch.autograd.grad(s, (q, k, v), torch.ones_like(s))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    _, s = tm.attention(*wide, backend="reference", **options)
    want = torch.autograd.grad(s, wide, torch.ones_like(s), allow_unused=True)
    assert error(got[0], want[0]) < 1e-5 and error(got[1], want[1]) < 1e-5
    assert torch.all(got[2] == 0)


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_keys_are_relatively_accurate(dtype, backend, isa):
    """With V = 1, rows divided by their sum are 1, also rows of small weights."""
    n = 20000
    q, k = randn(1, 3, 1, 64, dtype=dtype), randn(1, n, 1, 64, dtype=dtype)
    v = torch.ones(1, n, 1, 1, dtype=dtype)
    limit = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    for kind, score_bias in (("elu1", "neg_log_n"), ("relu", None), ("sigmoid", "neg_log_n")):
        options = {"kind": kind, "normalize": "sum", "score_bias": score_bias, "return_lse": True}
        moved = [t.to(device_of(backend)) for t in (q, k, v)]
        out, s = (t.cpu() for t in tm.attention(*moved, backend=backend, **options))
        wide = (t.double() for t in (q, k, v))
        want = tm.attention(*wide, backend="reference", **options)[1]
        assert (out - 1).abs().max() < limit
        assert ((s - want) / want).abs().max() < (1e-4 if dtype != torch.float32 else 1e-5)


@each_form()
def test_gradients_of_every_term(kind, normalize, backend):
    if kind == "relu" and normalize == "sum":
        return  # a row may sum to almost 0
    heads, n = 4, 19

    def make(dtype, g):
        q, k, v = (torch.randn(2, n, h, 12, generator=g).to(dtype) for h in (heads, 2, 2))
        options = {"kind": kind, "normalize": normalize, "softcap": 3.0, "causal": True}
        options["score_bias"] = torch.randn(2, heads, generator=g)
        options["bias"] = torch.randn(1, heads, n, n, generator=g).to(dtype)
        options["alibi_slopes"] = torch.rand(heads, generator=g)
        return (q, k, v), options | ({"return_lse": True} if normalize == "sum" else {})

    sample = registry.Sample(f"{kind} {normalize}", make)
    found = compare(SPEC, sample, backend, torch.float32, device=device_of(backend))
    assert not [c for c in found if not c.ok]
