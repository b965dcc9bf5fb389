"""Properties and regressions of attention."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, each_dtype, each_kernel, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import attention_samples
from tier import examples

import tokenmill as tm
from tokenmill import registry
from tokenmill.testing import assert_accurate, compare, error

SPEC = registry.get("attention")
INF, NAN = float("inf"), float("nan")

each_kind = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(150)
@given(sample=attention_samples())
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype)
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@each_dtype
@examples(8)
@given(sample=attention_samples(max_length=40))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


LONG = [
    registry.Sample(
        f"{kind}-{sq}x{sk}-{options}",
        lambda dtype, g, kind=kind, sq=sq, sk=sk, options=options: (
            (
                torch.randn(1, sq, 4, 40, generator=g).to(dtype),
                torch.randn(1, sk, 2, 40, generator=g).to(dtype),
                torch.randn(1, sk, 2, 72, generator=g).to(dtype),
            ),
            {"kind": kind, **options},
        ),
    )
    for kind in ("softmax", "sigmoid")
    for sq, sk in ((400, 1100), (1100, 400))
    for options in ({}, {"causal": True}, {"window": (130, 5)})
]


@pytest.mark.parametrize("isa", [i for b, i in cpu_variants() if b == "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", LONG, ids=lambda sample: sample.name)
def test_long_sequences_cross_every_tile_border(sample, dtype, isa):
    assert not [c for c in compare(SPEC, sample, "cpu", dtype) if not c.ok]


# --- numerics ---------------------------------------------------------------------------------

ROW_SUM = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@pytest.mark.parametrize("n", [256, 4096, 65536])
@each_dtype
def test_sums_of_small_weights_are_relatively_accurate(dtype, n, backend, isa):
    """V = 1: an absolute tolerance would hide an error of 100 % in weights near 1/n."""
    q, k = randn(1, 3, 1, 64, dtype=dtype), randn(1, n, 1, 64, dtype=dtype)
    v = torch.ones(1, n, 1, 1, dtype=dtype)
    want = tm.sigmoid_attention(q.double(), k.double(), v.double(), backend="reference")
    got = tm.sigmoid_attention(
        *(t.to(device_of(backend)) for t in (q, k, v)), backend=backend
    ).cpu()
    assert ((got.double() - want) / want).abs().max() < ROW_SUM[dtype]


@each_backend
@each_dtype
def test_weights_of_very_negative_scores_keep_their_digits(dtype, backend):
    """One key at a time, so that nothing larger hides the weight."""
    for z in (-5.0, -12.0, -25.0, -60.0, -80.0):
        q = torch.zeros(1, 1, 1, 16, dtype=dtype, device=device_of(backend))
        v = torch.full_like(q, 2.0**100 if dtype != torch.float16 else 2.0**15)
        got = tm.attention(q, q, v, kind="sigmoid", score_bias=z, backend=backend).cpu().double()
        want = torch.sigmoid(torch.tensor(z).double()) * v.cpu().double()
        # A score rounded to float32 is uncertain by |z| eps.
        limit = {torch.float32: 1e-7 * (4 - z), torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        if want.max() < 6e-5 and dtype == torch.float16:
            continue  # below the normal range of the result dtype
        assert ((got - want) / want).abs().max() < limit, z


@each_kernel
@each_dtype
def test_softmax_survives_scores_that_grow_along_the_keys(dtype, backend):
    """Every step raises the row maximum; the accumulators must follow it."""
    n = 600 if backend == "cpu" else 100
    q = torch.ones(1, 9, 1, 16)
    k = torch.linspace(-40, 40, n)[None, :, None, None].expand(1, n, 1, 16).contiguous()
    v = torch.randn(1, n, 1, 8)
    for order in (k, k.flip(1)):
        args = [t.to(dtype) for t in (q, order, v)]
        want = tm.attention(*(a.double() for a in args), backend="reference")
        plain = SPEC.plain(SPEC.record(*args))[0]
        moved = [a.to(device_of(backend)) for a in args]
        assert_accurate(tm.attention(*moved, backend=backend).cpu(), want, plain)


# --- the degenerate table ---------------------------------------------------------------------


@each_backend
@each_kind
@each_dtype
def test_a_row_that_sees_nothing_is_zero(kind, dtype, backend):
    q, k = (
        randn(1, 5, 2, 16, dtype=dtype, backend=backend),
        randn(1, 2, 2, 16, dtype=dtype, backend=backend),
    )
    leaves = [t.requires_grad_() for t in (q, k, k.clone())]
    out = tm.attention(*leaves, kind=kind, causal=True, backend=backend)
    assert torch.all(out[:, :3] == 0) and torch.all(out[:, 3:] != 0)
    dq, dk, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert torch.all(dq[:, :3] == 0)
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))
    if kind == "softmax":
        _, lse = tm.attention(*leaves, causal=True, return_lse=True, backend=backend)
        assert torch.all(lse[..., :3] == -INF) and torch.isfinite(lse[..., 3:]).all()
        sink = torch.tensor([0.25, -INF], device=q.device)
        out, lse = tm.attention(*leaves, causal=True, sink=sink, return_lse=True, backend=backend)
        assert torch.all(out[:, :3] == 0)
        assert torch.all(lse[:, 0, :3] == 0.25) and torch.all(lse[:, 1, :3] == -INF)


@each_backend
@each_kind
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)], ids=str)
def test_empty_dimensions(kind, shape, backend):
    b, sq, sk = shape
    q = randn(b, sq, 4, 8, backend=backend).requires_grad_()
    k, v = (randn(b, sk, 2, d, backend=backend).requires_grad_() for d in (8, 6))
    out = tm.attention(q, k, v, kind=kind, backend=backend)
    assert out.shape == (b, sq, 4, 6) and torch.all(out == 0)
    for grad in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert torch.all(grad == 0)


@each_backend
@each_kind
def test_a_single_key(kind, backend):
    q, k, v = (randn(1, 1, 1, 4, backend=backend) for _ in range(3))
    out = tm.attention(q, k, v, kind=kind, backend=backend)
    weight = torch.sigmoid((q * k).sum() / 2) if kind == "sigmoid" else 1.0
    torch.testing.assert_close(out, weight * v)


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
def test_the_only_key_of_a_row_has_weight_1(backend, isa):
    q, k = (randn(1, 1, 8, 64, backend=backend) for _ in range(2))
    v = torch.arange(-256.0, 256.0, device=device_of(backend)).view(1, 1, 8, 64)
    out, lse = tm.attention(q, k, v, scale=0.0, return_lse=True, backend=backend)
    assert torch.equal(out, v) and torch.all(lse == 0)


@each_kernel
@each_dtype
@pytest.mark.parametrize("scale", [0.0, None])
def test_one_key_keeps_the_error_budget(scale, dtype, backend):
    """lse is 0 at scale 0, and plain PyTorch makes no error in P = 1."""
    for seed in range(4):
        sample = registry.Sample(
            "one key",
            lambda dtype, g: (
                tuple(torch.randn(1, 1, 2, d, generator=g).to(dtype) for d in (35, 35, 8)),
                {"scale": scale, "return_lse": True},
            ),
        )
        found = compare(SPEC, sample, backend, dtype, device=device_of(backend), seed=seed)
        assert not [c for c in found if not c.ok]


@each_backend
@each_kind
def test_scale_zero(kind, backend):
    """The bias must not be divided by the scale."""
    q, k, v = (randn(1, 6, 1, 8, backend=backend) for _ in range(3))
    out = tm.attention(q, k, v, kind=kind, scale=0.0, score_bias=-1.0, backend=backend)
    weight = 1 / 6 if kind == "softmax" else 1 / (1 + math.e)
    torch.testing.assert_close(out, weight * v.sum(1, keepdim=True).expand_as(out))


@each_backend
@each_kind
def test_nan_in_a_query_stays_in_its_row(kind, backend):
    q, k, v = (randn(1, 13, 2, 8, backend=backend) for _ in range(3))
    q[0, 5, 1, 3] = NAN
    out = tm.attention(q, k, v, kind=kind, backend=backend)
    bad = torch.isnan(out).all(-1)
    assert bad[0, 5, 1] and bad.sum() == 1 and torch.isnan(out).any(-1).sum() == 1


@each_backend
@each_kind
def test_nan_in_a_key_reaches_the_rows_that_see_it(kind, backend):
    q, k, v = (randn(1, 9, 1, 8, backend=backend) for _ in range(3))
    k[0, 4] = NAN
    out = tm.attention(q, k, v, kind=kind, causal=True, backend=backend)
    assert torch.isfinite(out[:, :4]).all() and torch.isnan(out[:, 4:]).all()


@each_backend
@each_kind
def test_nan_in_a_neighbour_sequence_does_not_leak(kind, backend):
    q, k, v = (randn(40, 1, 8, backend=backend) for _ in range(3))
    k[:13] = NAN
    v[:13] = NAN
    k[27:] = INF
    v[27:] = INF
    cu = torch.tensor([0, 13, 27, 40], dtype=torch.int32, device=q.device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = tm.attention(*leaves, kind=kind, cu_seqlens_q=cu, max_seqlen_q=14, backend=backend)
    assert torch.isfinite(out[13:27]).all()
    for grad in torch.autograd.grad(out[13:27].sum(), leaves):
        assert torch.isfinite(grad[13:27]).all()


@each_backend
@each_kind
@pytest.mark.parametrize("shape", [(7, 9), (2, 1, 1, 9), (2, 4, 7, 1)], ids=str)
def test_a_mask_is_what_it_is_elsewhere(shape, kind, backend):
    """True means visible, as in other APIs; a row that sees nothing is 0."""
    q, k, v = (randn(2, n, 4, 16, dtype=torch.float16, backend=backend) for n in (7, 9, 9))
    mask = torch.rand(shape).to(q.device) < 0.6
    mask[0] = False
    if kind == "sigmoid":
        hidden = torch.where(mask, 0.0, -INF)
        want = tm.attention(q, k, v, kind=kind, bias=hidden, backend=backend)
        assert torch.equal(tm.attention(q, k, v, kind=kind, bias=mask, backend=backend), want)
        return
    out, lse = tm.attention(q, k, v, bias=mask, return_lse=True, backend=backend)
    wide = (t.transpose(1, 2).float() for t in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask)
    torch.testing.assert_close(out.transpose(1, 2).float(), want, rtol=2e-3, atol=2e-3)
    empty = ~mask.expand(2, 4, 7, 9).any(-1)
    assert torch.equal(lse == -INF, empty)
    assert not out.transpose(1, 2)[empty].any()


@each_backend
def test_infinite_biases(backend):
    q, k, v = (randn(1, 4, 1, 8, backend=backend) for _ in range(3))
    bias = torch.zeros(4, 4, device=q.device)
    bias[0] = -INF
    bias[1, 2] = INF
    bias[2, 1:] = -INF
    bias[3] = torch.finfo(torch.float32).min
    out, lse = tm.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    assert torch.all(out[0, 0] == 0) and lse[0, 0, 0] == -INF
    torch.testing.assert_close(out[0, 1], v[0, 2])
    torch.testing.assert_close(out[0, 2], v[0, 0])
    torch.testing.assert_close(out[0, 3], v.mean(1)[0])  # all scores are equal
    out = tm.attention(q, k, v, bias=bias, kind="sigmoid", backend=backend)
    assert torch.all(out[0, 0] == 0) and torch.all(out[0, 3] == 0)


@each_backend
@pytest.mark.parametrize("sink", [-INF, -300.0, 0.0, 300.0, INF])
def test_sinks_far_above_and_below_the_scores(sink, backend):
    """exp(sink - row_max) overflows from 88 on unless the sink takes part in row_max."""
    q, k, v = (randn(1, 5, 2, 8, backend=backend) for _ in range(3))
    logits = torch.full((2,), sink, device=q.device, requires_grad=True)
    out, lse = tm.attention(q, k, v, sink=logits, return_lse=True, backend=backend)
    (grad,) = torch.autograd.grad(out.sum() + lse.clamp(max=1e3).sum(), logits, retain_graph=True)
    assert torch.isfinite(grad).all()
    out, lse = out.detach(), lse.detach()
    plain, plain_lse = tm.attention(q, k, v, return_lse=True, backend=backend)
    want = torch.logaddexp(plain_lse.double(), torch.tensor(sink).double()).float()
    torch.testing.assert_close(lse, want, rtol=1e-5, atol=1e-5)
    weight = torch.exp(plain_lse - want).transpose(1, 2)[..., None]
    torch.testing.assert_close(out, plain * weight, rtol=1e-4, atol=1e-6)


@each_backend
@pytest.mark.parametrize("score_bias", [None, -2.1788])
def test_without_keys_the_lse_is_the_sink(score_bias, backend):
    """A sink that passes through base 2 comes back rounded, and the score_bias, which nothing
    depends on, would have a gradient."""
    sink = torch.tensor([0.56840003, 1 / 3, -7.1, 123.456])
    q, k = randn(1, 2, 4, 8, backend=backend), randn(1, 0, 4, 8, backend=backend)
    leaves = [sink.to(q.device).requires_grad_()]
    bias = None
    if score_bias is not None:
        bias = torch.full((4,), score_bias, device=q.device, requires_grad=True)
        leaves.append(bias)
    out, lse = tm.attention(
        q, k, k, sink=leaves[0], score_bias=bias, return_lse=True, backend=backend
    )
    assert torch.all(out == 0)
    assert torch.equal(lse.detach().cpu(), sink.detach().cpu()[None, :, None].expand(1, 4, 2))
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert torch.equal(grads[0].cpu(), torch.full((4,), 2.0))
    for grad in grads[1:]:
        assert torch.all(grad == 0)


@each_backend
def test_saturated_sigmoid_has_finite_gradients(backend):
    q, k = (randn(1, 4, 1, 8, backend=backend) for _ in range(2))
    for bias in (-1000.0, -100.0, 100.0, 1000.0, INF, -INF):
        leaves = [t.clone().requires_grad_() for t in (q, k, k)]
        out = tm.attention(*leaves, kind="sigmoid", score_bias=bias, backend=backend)
        want = k.sum(1, keepdim=True).expand_as(out) if bias > 0 else torch.zeros_like(out)
        torch.testing.assert_close(out, want)
        for grad in torch.autograd.grad(out.sum(), leaves):
            assert torch.isfinite(grad).all()


# --- identities -------------------------------------------------------------------------------


@each_backend
@examples(20)
@given(
    left=st.integers(0, 9), right=st.integers(0, 9), sq=st.integers(1, 20), sk=st.integers(1, 20)
)
def test_window_is_the_band_that_the_documentation_says(left, right, sq, sk, backend):
    q, k = (randn(1, n, 1, 4, backend=backend) for n in (sq, sk))
    v = torch.eye(sk, device=q.device)[None, :, None, :]
    weights = tm.attention(q, k, v, kind="sigmoid", window=(left, right), backend=backend)[0, :, 0]
    for i in range(sq):
        own = i + sk - sq
        seen = {j for j in range(sk) if weights[i, j] != 0}
        assert seen == {j for j in range(sk) if own - left <= j <= own + right}


@each_backend
@each_kind
def test_packed_equals_each_sequence_alone(kind, backend):
    lengths_q, lengths_k = [4, 0, 11, 7], [9, 3, 0, 7]
    q = randn(sum(lengths_q), 4, 8, backend=backend)
    k, v = (randn(sum(lengths_k), 2, 8, backend=backend) for _ in range(2))
    cu_q, cu_k = (
        torch.tensor([0, *n]).cumsum(0).to(torch.int32).to(q.device) for n in (lengths_q, lengths_k)
    )
    options = {"kind": kind, "causal": True, "score_bias": "neg_log_n", "backend": backend}
    out = tm.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    for b in range(4):
        rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = tm.attention(q[None, rows], k[None, columns], v[None, columns], **options)
        torch.testing.assert_close(out[rows], alone[0])


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@pytest.mark.parametrize("tokens", [0, 3, 300])
@each_kind
def test_packed_rows_without_sequences_see_nothing(kind, tokens, backend):
    """The values of cu_seqlens are not checked here. 3 rows are fewer than any tile has."""
    leaves = [randn(tokens, 2, 8, backend=backend).requires_grad_() for _ in range(3)]
    cu = torch.zeros(1, dtype=torch.int32, device=leaves[0].device)
    out = tm.attention(*leaves, kind=kind, cu_seqlens_q=cu, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    if kind == "softmax":
        lse = tm.attention(*leaves, cu_seqlens_q=cu, return_lse=True, backend=backend)[1]
        assert torch.equal(lse, torch.full_like(lse, -INF))
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@each_kernel
def test_grouped_heads_equal_repeated_heads(backend):
    q = randn(2, 9, 6, 8, backend=backend).requires_grad_()
    k, v = (randn(2, 9, 2, 8, backend=backend).requires_grad_() for _ in range(2))
    grouped = tm.attention(q, k, v, backend=backend)
    repeated = tm.attention(
        q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), backend=backend
    )
    torch.testing.assert_close(grouped, repeated)
    cotangent = torch.randn_like(grouped)
    for a, b in zip(
        torch.autograd.grad(grouped, (q, k, v), cotangent),
        torch.autograd.grad(repeated, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_kernel
def test_softmax_agrees_with_pytorch(backend):
    q, k, v = (randn(2, 50, 4, 32, backend=backend) for _ in range(3))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(tm.attention(q, k, v, causal=True, backend=backend), theirs)


@each_backend
def test_sigmoid_attention_is_attention_with_minus_log_n(backend):
    q, k, v = (randn(1, 12, 2, 8, backend=backend) for _ in range(3))
    a = tm.sigmoid_attention(q, k, v, backend=backend)
    b = tm.attention(q, k, v, kind="sigmoid", score_bias=-math.log(12), backend=backend)
    torch.testing.assert_close(a, b)


@each_backend
@examples(10)
@given(cut=st.integers(0, 30), kind=st.sampled_from(["softmax", "sigmoid"]))
def test_attention_over_parts_of_the_keys_merges_to_the_whole(cut, kind, backend):
    q, k, v = (randn(1, 30, 2, 8, backend=backend) for _ in range(3))
    options = {"kind": kind, "return_lse": kind == "softmax", "backend": backend}
    parts = [tm.attention(q, k[:, s], v[:, s], **options) for s in (slice(0, cut), slice(cut, 30))]
    whole = tm.attention(q, k, v, **options)
    if kind == "sigmoid":
        merged, _ = tm.merge_attention_states(torch.stack(parts), backend=backend)
        torch.testing.assert_close(merged, whole)
    else:
        outs, lses = (torch.stack([p[i] for p in parts]) for i in (0, 1))
        for a, b in zip(tm.merge_attention_states(outs, lses, backend=backend), whole, strict=True):
            torch.testing.assert_close(a, b)


@each_kernel
def test_lse_alone_can_be_differentiated(backend):
    q, k, v = (randn(1, 11, 2, 8, backend=backend).requires_grad_() for _ in range(3))
    _, lse = tm.attention(q, k, v, return_lse=True, backend=backend)
    got = torch.autograd.grad(lse, (q, k, v), torch.ones_like(lse))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    _, lse = tm.attention(*wide, return_lse=True, backend="reference")
    want = torch.autograd.grad(lse, wide, torch.ones_like(lse), allow_unused=True)
    assert error(got[0], want[0]) < 1e-5 and error(got[1], want[1]) < 1e-5
    assert torch.all(got[2] == 0)


# --- the process ------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_square_of_the_length():
    """Forward and backward of 16k tokens: the score matrix would take 1 GiB per head."""
    import resource

    n = 16384
    q, k, v = (torch.randn(1, n, 1, 16).requires_grad_() for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = tm.attention(q, k, v, kind="sigmoid", window=(256, 256))
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100 * n * 16 * 4


def _attend(_):
    torch.manual_seed(0)
    q = torch.randn(1, 200, 4, 32)
    return tm.attention(q, q, q).sum().item()


def test_spawned_workers_run_after_a_parallel_region_of_the_parent():
    import multiprocessing

    want = _attend(0)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map_async(_attend, range(2)).get(timeout=120) == [want, want]


def test_calls_from_several_threads_are_independent():
    from concurrent.futures import ThreadPoolExecutor

    q = [torch.randn(1, 150 + i, 2, 32) for i in range(8)]
    want = [tm.attention(x, x, x) for x in q]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = pool.map(lambda x: tm.attention(x, x, x), q)
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_shapes_are_refused_before_values(backend):
    q, bad = torch.zeros(5, 2, 8), torch.tensor([1, 5], dtype=torch.int32)
    slopes = torch.ones(3)
    with pytest.raises(RuntimeError, match="attention: alibi_slopes: must have shape"):
        tm.attention(q, q, q, cu_seqlens_q=bad, alibi_slopes=slopes, backend=backend)


@pytest.mark.skipif("cpu" not in backends(), reason="no CPU backend")
def test_heads_that_share_a_bias_take_turns(threads):
    """Partial sums of 341 of these heads fit in memory at once; one thread needs none."""
    q, k, v = (torch.randn(345, n, 1, 16, requires_grad=True) for n in (130, 970, 970))
    bias = torch.randn(1, 1, 1, 970, requires_grad=True)

    def gradients(count):
        threads(count)
        out = tm.attention(q, k, v, bias=bias)
        return torch.autograd.grad(out, (q, k, v, bias), torch.ones_like(out))

    assert all(torch.equal(a, b) for a, b in zip(gradients(1), gradients(2), strict=True))


@pytest.mark.parametrize("name", ["attention", "attention_decode"])
def test_the_signature_has_the_defaults_of_the_schema(name):
    """A call runs with the defaults of the schema, wherever lower does not name the argument."""
    spec = tm.registry.get(name)
    lowered = inspect.signature(spec.lower).parameters
    schema = {n: x for n, x in spec.forward.defaults.items() if n not in lowered}
    declared = inspect.signature(spec.function).parameters
    shared = [
        n for n in declared if n in schema and declared[n].default is not inspect.Parameter.empty
    ]
    assert {"kind", "softcap", "causal", "sink"} <= {*shared}
    assert {n: declared[n].default for n in shared} == {n: schema[n] for n in shared}
