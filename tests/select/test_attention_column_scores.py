"""attention_column_scores: column sums of attention, and the noise of Keyformer."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, ints
from hypothesis import given
from hypothesis import strategies as st
from strategies import HEAD_DIMS, layouts
from tier import examples

import tokenmill as tm
from tokenmill.reference.select.gumbel import gumbel_words
from tokenmill.registry import Sample

SPEC = tm.registry.get("attention_column_scores")
NAN, INF = float("nan"), float("inf")


def draw(b, sq, sk, h, hk, d, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(b, sq, h, d, generator=g), torch.randn(b, sk, hk, d, generator=g)
    return q.to(device, dtype), k.to(device, dtype)


@st.composite
def calls(draw, longest):
    length = st.one_of(st.sampled_from([0, 1, 2, 15, 16, 17, 48, 64, 65]), st.integers(0, longest))
    b, sq, sk = draw(st.integers(0, 2)), draw(length), draw(length)
    hk, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3)]))
    d = draw(HEAD_DIMS)
    options = {
        "causal": draw(st.booleans()),
        "reduce": draw(st.sampled_from(["sum", "mean", "visible_mean"])),
        "head_reduce": draw(st.sampled_from(["none", "group_mean", "group_max"])),
        "window_queries": draw(st.sampled_from([None, None, 1, 7, 64])),
        "scale": draw(st.sampled_from([None, 0.0, 0.4, -0.2])),
    }
    if draw(st.booleans()):
        options |= {"gumbel_tau": draw(st.sampled_from([0.5, 1.0, 2.0])), "seed": 11}
    lists = {}
    for name, maximum in (("seqlens_k", sk), ("seqlens_q", sq)):
        if draw(st.booleans()):
            lists[name] = draw(st.lists(st.integers(0, maximum), min_size=b, max_size=b))
    order = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))

    def make(dtype, g):
        q = layouts((b, sq, hk * group, d), dtype, g)[order[0]]()
        k = layouts((b, sk, hk, d), dtype, g)[order[1]]()
        given = {name: ints(*values) for name, values in lists.items()}
        return (q, k), options | given

    return Sample(f"q {(b, sq, hk * group, d)} k {(sk, hk)} {options} {lists}", make)


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@examples(25)
@given(data=st.data())
def test_any_call_keeps_the_error_budget(backend, isa, data):
    few = backend == "triton"
    sample = data.draw(calls(40 if few else 150))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    found = tm.testing.compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(
    ("backend", "isa"), [v for v in cpu_variants() if v[0] != "triton"], indirect=["isa"]
)
def test_several_tiles_and_splits(backend, isa, d, dtype):
    def make(dtype, g):
        return draw(1, 300, 700, 2, 1, d, dtype), {"causal": True}

    found = tm.testing.compare(
        SPEC, Sample("long", make), backend, dtype, device=device_of(backend)
    )
    assert all(c.ok for c in found), found


@each_backend
def test_scores_of_all_keys_count_the_queries_that_see_one(backend):
    q, k = draw(2, 50, 30, 4, 2, 16, device=device_of(backend))
    scores = tm.attention_column_scores(q, k, causal=True, backend=backend)
    # Queries 0 .. 19 are before the first key, by up to 20 positions.
    torch.testing.assert_close(scores.sum(-1), torch.full_like(scores[..., 0], 30.0))
    means = tm.attention_column_scores(
        q, k, causal=True, backend=backend, reduce="visible_mean", window_queries=10
    )
    # Key 29 is seen by one query of ten, key 0 by all.
    sums = tm.attention_column_scores(q, k, causal=True, backend=backend, window_queries=10)
    divisor = (30 - torch.arange(30, device=q.device)).clamp(max=10)
    torch.testing.assert_close(means, sums / divisor)


@each_backend
def test_lse_of_the_forward_gives_the_same_as_none(backend):
    q, k = draw(2, 40, 40, 4, 2, 32, device=device_of(backend))
    z = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 32**-0.5
    seen = torch.ones(40, 40, dtype=torch.bool, device=q.device).tril()
    lse = z.masked_fill(~seen, -INF).logsumexp(-1)
    given = tm.attention_column_scores(q, k, lse, causal=True, backend=backend)
    found = tm.attention_column_scores(q, k, causal=True, backend=backend)
    torch.testing.assert_close(given, found, rtol=2e-6, atol=2e-6)
    lse[:, :, 7] = -INF
    without = tm.attention_column_scores(q, k, lse, causal=True, backend=backend)
    p = torch.exp(z[:, :, 7] - z[:, :, 7, :8].logsumexp(-1, keepdim=True)) * seen[7]
    torch.testing.assert_close(given - without, p, rtol=1e-4, atol=2e-6)


@each_backend
def test_nothing_beyond_the_lengths_counts(backend):
    device = device_of(backend)
    q, k = draw(2, 20, 70, 2, 1, 32, device=device)
    seqlens_k, seqlens_q = ints(33, 64, backend=backend), ints(20, 5, backend=backend)
    options = {"seqlens_k": seqlens_k, "seqlens_q": seqlens_q, "causal": True}
    want = tm.attention_column_scores(q, k, backend=backend, **options)
    k[0, 33:], k[1, 64:], q[1, 5:] = NAN, INF, NAN
    found = tm.attention_column_scores(q, k, backend=backend, **options)
    assert torch.equal(found, want)
    assert (found[0, :, 33:] == 0).all() and (found[1, :, 64:] == 0).all()


@each_backend
def test_nan_stays_with_what_sees_it(backend):
    q, k = draw(1, 30, 30, 1, 1, 16, device=device_of(backend))
    q[0, 12] = NAN
    scores = tm.attention_column_scores(q, k, causal=True, backend=backend)[0, 0]
    assert scores[:13].isnan().all() and not scores[13:].isnan().any()


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_lengths_out_of_range_are_clamped(backend):
    device = device_of(backend)
    q, k = draw(4, 6, 9, 1, 1, 8, device=device)
    wild = ints(-5, 2**31 - 1, 10, -(2**31), backend=backend)
    found = tm.attention_column_scores(q, k, seqlens_k=wild, seqlens_q=wild, backend=backend)
    want = tm.attention_column_scores(
        q, k, seqlens_k=ints(0, 9, 9, 0, backend=backend),
        seqlens_q=ints(0, 6, 6, 0, backend=backend), backend=backend,
    )  # fmt: skip
    assert torch.equal(found, want)


def test_words_are_those_of_philox():
    """The known answer of Random123 for counter and key 0, and independence of the slice."""
    assert gumbel_words(0, 1, 1, 1, 1).item() == 0x6627E8D5
    whole = gumbel_words(2**45 + 9, 3, 2, 5, 7)
    part = gumbel_words(2**45 + 9, 1, 2, 3, 7, first_batch=2, first_row=2)
    assert torch.equal(whole[2:, :, 2:], part)
    assert len(whole.unique()) == whole.numel()
    before = gumbel_words(1, 1, 1, 2, 1, first_row=-2)
    assert torch.equal(
        before[0, 0, :, 0], gumbel_words(1, 1, 1, 2, 1, first_row=2**32 - 2).flatten()
    )


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])
def test_noise_is_that_of_the_helper(backend, isa, seed):
    """One query with q = 0: the score is softmax(g / tau), so that every word matters."""
    device = device_of(backend)
    b, h, n = 2, 3, 150
    q, k = torch.zeros(b, 1, h, 8, device=device), torch.zeros(b, n, h, 8, device=device)
    found = tm.attention_column_scores(q, k, gumbel_tau=0.8, seed=seed, backend=backend).cpu()
    noise = tm.select.gumbel_noise(seed, b, h, 1, n, first_row=n - 1, dtype=torch.float64)[:, :, 0]
    torch.testing.assert_close(found.double().log() * 0.8 - noise,
                               (found.double().log() * 0.8 - noise)[..., :1].expand_as(noise),
                               rtol=0, atol=4e-6)  # fmt: skip
    torch.testing.assert_close(found.double(), (noise / 0.8).softmax(-1), rtol=4e-6, atol=0)


@each_backend
def test_noise_knows_positions_not_rows(backend):
    """Chunks of a causal prefill give the result of the whole, and each decode step has fresh
    noise."""
    q, k = draw(1, 24, 24, 2, 1, 16, device=device_of(backend))
    options = {"causal": True, "gumbel_tau": 1.0, "seed": 4, "backend": backend}
    whole = tm.attention_column_scores(q, k, **options)
    parts = [
        torch.nn.functional.pad(
            tm.attention_column_scores(q[:, i : i + 8], k[:, : i + 8], **options), (0, 16 - i)
        )
        for i in (0, 8, 16)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)


def test_noisy_softmax_is_near_softmax_but_biased():
    q, k = draw(1, 1, 12, 1, 1, 16)
    plain = tm.attention_column_scores(q, k)
    mean = torch.stack(
        [tm.attention_column_scores(q, k, gumbel_tau=1.0, seed=s) for s in range(2000)]
    ).mean(0)
    assert mean.argmax() == plain.argmax()
    assert 0.01 < (mean - plain).abs().max() < 0.2


def test_memory_is_linear():
    """A weight matrix would take 4 GB."""
    import resource

    q, k = draw(1, 32768, 32768, 1, 1, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = tm.attention_column_scores(q, k, causal=True, backend="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    torch.testing.assert_close(scores.sum(), torch.tensor(32768.0), rtol=1e-4, atol=0)
