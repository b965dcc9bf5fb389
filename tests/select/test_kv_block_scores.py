"""kv_block_scores: the definition in loops, bounds, and values that must not affect a score."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, each_kernel
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

INF, NAN = float("inf"), float("nan")


def larger(a, b):
    return NAN if a != a or b != b else max(a, b)


def by_definition(q, k, n, o):
    """One request in plain Python: q [Sq, H, D], rows of k. Returns [H*, rows, blocks]."""
    queries, heads = q.shape[:2]
    rows, group = len(k), heads // k.shape[1]
    raw = o["scoring"] == "max_block"
    row_tokens, block_rows = (1, o["block_k"]) if raw else (o["block_k"], 1)
    n = min(max(n, 0), rows * row_tokens)

    def score(x, h, j):
        key = k[j, h // group].double()
        if o["scoring"] != "minmax":
            return float(x @ key) * o["scale"]
        if key[0, 0] > key[1, 0]:
            return -INF
        return float((x * torch.where(x > 0, key[1], key[0])).sum()) * o["scale"]

    def sees(i, j):
        end = n - o["num_recent"] + (i - queries + 1 if o["causal"] else 0)
        tokens = range(j * row_tokens, (j + 1) * row_tokens)
        return any(o["num_sink"] <= t < end for t in tokens)

    out_rows, blocks = -(-queries // o["block_q"]), -(-rows // block_rows)
    z = torch.full((heads, out_rows, blocks), -INF, dtype=torch.float64)
    seen = torch.zeros(out_rows, blocks, dtype=torch.bool)
    for h, r, j in itertools.product(range(heads), range(out_rows), range(rows)):
        those = range(r * o["block_q"], min((r + 1) * o["block_q"], queries))
        if o["q_reduce"] == "mean":
            mean = (q[list(those), h].float().sum(0) / len(those)).to(q.dtype).double()
            pairs = [(those[-1], mean)]
        else:
            pairs = [(i, q[i, h].double()) for i in those]
        for i, x in pairs:
            if sees(i, j):
                b = j // block_rows
                seen[r, b] = True
                z[h, r, b] = larger(z[h, r, b].item(), score(x, h, j))
    if o["head_reduce"] == "none":
        return z
    if o["head_reduce"] == "softmax_vote":
        votes = torch.full((1, out_rows, blocks), -INF, dtype=torch.float64)
        for r in range(out_rows):
            if seen[r].any():
                zs = z[:, r, seen[r]]
                top = zs.amax(1, keepdim=True)
                e = (zs - top).exp()
                votes[0, r, seen[r]] = (e / e.sum(1, keepdim=True)).sum(0)
        return votes
    z = z.unflatten(0, (k.shape[1], group))
    return z.amax(1) if o["head_reduce"] == "group_max" else z.sum(1) / group


@st.composite
def calls(draw, longest):
    """Draws integer-valued queries and keys: sums are exact in any order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (1, 7), (1, 12)]))
    batch, queries = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 5, 9, 20]))
    dim = draw(st.sampled_from([1, 4, 16, 24, 64, 70, 128]))
    rows = draw(st.one_of(st.sampled_from([1, 15, 16, 17, 64, 65]), st.integers(1, longest)))
    scoring = draw(st.sampled_from(["dot", "minmax", "max_block"]))
    o = {
        "scoring": scoring,
        "block_k": draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16, 24, 32, 100])),
        "q_reduce": draw(st.sampled_from(["none", "mean", "max"])),
        "block_q": 1,
        "head_reduce": draw(st.sampled_from(["none", "group_max", "group_mean", "softmax_vote"])),
        "scale": draw(st.sampled_from([1.0, 0.25, -0.5])),
        "causal": draw(st.booleans()),
        "num_sink": draw(st.sampled_from([0, 0, 1, 7])),
        "num_recent": draw(st.sampled_from([0, 0, 1, 9])),
    }
    if o["q_reduce"] != "none":
        o["block_q"] = draw(st.sampled_from([1, 2, 4, 8, 16]))
    tokens = rows * (1 if scoring == "max_block" else o["block_k"])
    half = (2,) if scoring == "minmax" else ()
    q = torch.randint(-4, 5, (batch, queries, kv_heads * group, dim), generator=generator)
    k = torch.randint(-4, 5, (batch, rows, kv_heads, *half, dim), generator=generator)
    if scoring == "minmax":
        k = k.sort(3)[0]
    q, k = q.to(dtype), k.to(dtype)
    lengths = None
    if draw(st.booleans()):
        lengths = torch.tensor(
            [draw(st.integers(-1, tokens + 3)) for _ in range(batch)], dtype=torch.int32
        )
    cache, table = k, None
    if draw(st.booleans()):
        page = draw(st.sampled_from([1, 4, 16]))
        pages = -(-rows // page)
        table = torch.randperm(batch * pages + 1, generator=generator)[: batch * pages].int()
        table = table.view(batch, pages)
        whole = torch.zeros(batch, pages * page, *k.shape[2:], dtype=dtype)
        whole[:, :rows] = k
        cache = torch.full((batch * pages + 1, page, *k.shape[2:]), NAN, dtype=dtype)
        cache[table.long()] = whole.unflatten(1, (pages, page))
        k = whole
    elif draw(st.booleans()):
        cache = k.transpose(1, 2).contiguous().transpose(1, 2)
    return q, k, cache, {**o, "seqlens_k": lengths, "block_table": table}


def check(call, backend):
    q, k, cache, options = call
    device = device_of(backend)
    there = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    found = tm.kv_block_scores(q.to(device), cache.to(device), **there, backend=backend).cpu()
    assert found.dtype == torch.float32
    lengths = options["seqlens_k"]
    for b in range(len(q)):
        n = k.shape[1] * options["block_k"] if lengths is None else lengths[b].item()
        wanted = by_definition(q[b], k[b], n, options)
        if options["head_reduce"] == "softmax_vote":
            torch.testing.assert_close(found[b].double(), wanted, rtol=1e-5, atol=1e-7)
        elif options["q_reduce"] == "mean" and q.dtype == torch.float32:  # a mean of 3 is not exact
            torch.testing.assert_close(found[b].double(), wanted, rtol=1e-5, atol=1e-5)
        elif options["head_reduce"] == "group_mean":  # a group of 3, 7 or 12 rounds once
            assert torch.equal(found[b], wanted.float())
        else:
            assert torch.equal(found[b].double(), wanted)


@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
@examples(80)
@given(call=calls(longest=150))
def test_definition_on_every_instruction_set(call, backend, isa):
    check(call, backend)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "cpu"])
@examples(40)
@given(call=calls(longest=70))
def test_definition(call, backend):
    check(call, backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_bound_of_a_box_holds(dtype, backend):
    """Rounded boxes would break the bound in 16 bits: minima and maxima are elements of the
    keys."""
    q = torch.randn(2, 3, 8, 64).to(dtype).to(device_of(backend))
    k = torch.randn(2, 200, 2, 64).to(dtype).to(device_of(backend))
    boxes = tm.block_pool_keys(k, 16, mode="minmax", backend=backend)
    bound = tm.kv_block_scores(q, boxes, scoring="minmax", block_k=16, scale=1.0, backend=backend)
    best = tm.kv_block_scores(q, k, scoring="max_block", block_k=16, scale=1.0, backend=backend)
    assert (bound >= best - 1e-4).all()
    single = tm.block_pool_keys(k, 1, mode="minmax", backend=backend)
    bound = tm.kv_block_scores(q, single, scoring="minmax", scale=1.0, backend=backend)
    exact = tm.kv_block_scores(q, k, scale=1.0, backend=backend)
    torch.testing.assert_close(bound, exact, rtol=1e-5, atol=1e-4)


@each_backend
@pytest.mark.parametrize("scoring", ["dot", "minmax", "max_block"])
@pytest.mark.parametrize("head_reduce", ["none", "group_mean", "softmax_vote"])
def test_nothing_beyond_the_length_counts(scoring, head_reduce, backend):
    device = device_of(backend)
    half = (2,) if scoring == "minmax" else ()
    q = torch.randn(1, 2, 4, 32, device=device)
    k = torch.randn(1, 50, 2, *half, 32, device=device)
    lengths = torch.tensor([21], dtype=torch.int32, device=device)
    options = {"scoring": scoring, "head_reduce": head_reduce, "block_k": 3, "seqlens_k": lengths}
    options["causal"] = True
    clean = tm.kv_block_scores(q, k, **options, backend=backend)
    k[:, 21 if scoring == "max_block" else 7 :] = NAN
    assert torch.equal(clean, tm.kv_block_scores(q, k, **options, backend=backend))
    assert not clean.isnan().any() and (clean[..., 7:] == -INF).all()


@each_backend
@pytest.mark.parametrize("at", [0, 15, 16, 31, 40])
@pytest.mark.parametrize("block_k", [1, 4, 16, 32, 20])
def test_a_nan_stays_in_its_block(at, block_k, backend):
    device = device_of(backend)
    q, k = torch.randn(1, 1, 4, 32, device=device), torch.randn(1, 64, 2, 32, device=device)
    options = {"scoring": "max_block", "block_k": block_k, "head_reduce": "group_max"}
    clean = tm.kv_block_scores(q, k, **options, backend=backend)
    k[0, at, 1, 5] = NAN
    poisoned = tm.kv_block_scores(q, k, **options, backend=backend)
    bad = poisoned.isnan().nonzero().tolist()
    assert bad == [[0, 1, 0, at // block_k]]
    assert torch.equal(poisoned.nan_to_num(0), torch.where(poisoned.isnan(), 0, clean))


@each_backend
def test_a_nan_of_a_query_stays_in_its_rows(backend):
    """A vote is NaN everywhere: every block sums all heads."""
    device = device_of(backend)
    q, k = torch.randn(2, 3, 4, 32, device=device), torch.randn(2, 20, 2, 32, device=device)
    q[1, 2, 1, 7] = NAN
    for head_reduce, heads in (("none", [1]), ("group_max", [0]), ("softmax_vote", [0])):
        z = tm.kv_block_scores(q, k, head_reduce=head_reduce, backend=backend)
        bad = z.isnan()
        assert bad[1, heads, 2].all() and bad.sum() == 20


@each_backend
def test_a_vote_sums_to_the_heads_over_many_tokens(backend):
    """Small weights are accurate relative to their size: uniform ones over 5000 tokens, in several
    pieces of a row."""
    tokens = 700 if backend == "triton" else 5000
    q = torch.zeros(1, 1, 6, 16, device=device_of(backend))
    k = torch.randn(1, tokens, 2, 16, device=device_of(backend))
    vote = tm.kv_block_scores(
        q, k, head_reduce="softmax_vote", num_sink=7, num_recent=90, backend=backend
    )[0, 0, 0]
    assert (vote[:7] == -INF).all() and (vote[-90:] == -INF).all()
    torch.testing.assert_close(
        vote[7:-90], torch.full_like(vote[7:-90], 6 / (tokens - 97)), rtol=2e-6, atol=0
    )
    k[0, :, :, 0] = torch.linspace(0, 80, tokens)[:, None]  # weights over 35 orders of magnitude
    q[..., 0] = 1
    vote = tm.kv_block_scores(q, k, head_reduce="softmax_vote", scale=1.0, backend=backend)
    z = k[0, :, :, 0].double().repeat_interleave(3, 1)
    wanted = z.softmax(0).sum(1)
    torch.testing.assert_close(vote[0, 0, 0].double(), wanted, rtol=2e-5, atol=1e-30)


@each_kernel
def test_long_sets_go_through_shared_memory_in_pieces(backend):
    """130 queries of 2 heads give one result."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-3, 4, (1, 130, 2, 32), generator=generator).half()
    k = torch.randint(-3, 4, (1, 40, 1, 32), generator=generator).half()
    options = {"q_reduce": "max", "block_q": 130, "causal": True, "scale": 1.0}
    for scoring, reduce in itertools.product(("dot", "max_block"), ("group_max", "group_mean")):
        both = {**options, "scoring": scoring, "head_reduce": reduce}
        both["block_k"] = 16 if scoring == "max_block" else 4
        there = (q.to(device_of(backend)), k.to(device_of(backend)))
        found = tm.kv_block_scores(*there, **both, backend=backend).cpu()
        assert torch.equal(found, tm.kv_block_scores(q, k, **both, backend="reference"))


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_pages_out_of_range_count_as_zeros(backend):
    device = device_of(backend)
    q, k = torch.ones(1, 1, 2, 8, device=device), torch.ones(3, 4, 1, 8, device=device)
    table = torch.tensor([[0, -1, 3, 2**31 - 1, 2]], dtype=torch.int32, device=device)
    z = tm.kv_block_scores(
        q, k, block_table=table, block_k=4, scoring="max_block", scale=1.0, backend=backend
    )
    assert z[0, 0, 0].tolist() == [8, 0, 0, 0, 8]


def test_gradients_are_not_asked_for():
    q, k = torch.randn(1, 1, 2, 8, requires_grad=True), torch.randn(1, 9, 1, 8, requires_grad=True)
    assert not tm.kv_block_scores(q, k).requires_grad


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 24])
def test_heads_of_a_group_have_the_bits_of_one_head(backend, dtype, dim):
    """Up to 8 heads share a read of a key, in parts of 4, 3, 2 and 1."""
    k = torch.randn(1, 41, 2, dim).to(dtype)
    for group in range(1, 9):
        q = torch.randn(1, 1, 2, group, dim).to(dtype)
        z = tm.kv_block_scores(q.flatten(2, 3), k, backend=backend).view(2, group, 41)
        for g in range(group):
            one = tm.kv_block_scores(q[:, :, :, g], k, backend=backend)
            assert torch.equal(z[:, g], one[0, :, 0])


@each_backend
@pytest.mark.parametrize("angle", [0.0, 0.44, 0.46, 3.1])
def test_gate(angle, backend):
    """The thresholds are cos 0.44 = 0.905 and cos 0.46 = 0.896."""
    device = device_of(backend)
    q = torch.zeros(1, 3, 2, 2, device=device)
    q[..., 0] = torch.tensor([[0.5], [1.5], [4.0]], device=device)
    ref = torch.tensor([math.cos(angle), math.sin(angle)], device=device).expand(1, 1, 2, 2)
    reached = tm.query_similarity_gate(q, ref.contiguous(), 0.9, backend=backend)
    assert reached.tolist() == [angle < 0.45]
