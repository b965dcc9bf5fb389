"""hip_block_select: contents of its lists, blocks that it must find, and blocks that it may
miss."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend
from hip_requests import Requests, ends, forms
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

NAN = float("nan")


def whole(shape, generator, dtype=torch.float32, maximum=4):
    """Integers: products are exact in any order."""
    return torch.randint(-maximum, maximum + 1, shape, generator=generator).to(dtype)


def select(q, k, backend, **options):
    device = device_of(backend)

    def there(x):
        if isinstance(x, tuple):
            return tuple(map(there, x))
        return x.to(device) if isinstance(x, torch.Tensor) else x

    options = {name: there(value) for name, value in options.items()}
    lists = tm.hip_block_select(there(q), there(k), **options, backend=backend)
    return tuple(t.cpu() for t in lists)


def admissible(o, queries, tokens, row):
    """First and last + 1 admissible block of a query block, found by testing every pair."""
    last = min((row + 1) * o["block_q"], queries) - 1
    seen = tokens - queries + last + 1 if o["causal"] else tokens
    counted = range(o["num_sink"], max(seen - o["num_recent"], o["num_sink"]))
    blocks = sorted({j // o["block_k"] for j in counted})
    return (blocks[0], blocks[-1] + 1) if blocks else (0, 0)


@st.composite
def calls(draw, longest=220, max_lists=200):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (1, 7)]))
    batch, dim = draw(st.integers(1, 2)), draw(st.sampled_from([1, 4, 16, 24, 64, 67, 130]))
    queries = draw(st.sampled_from([1, 1, 2, 5, 20, 41]))
    tokens = draw(st.integers(0, longest))
    block_k = draw(st.sampled_from([1, 2, 2, 3, 8, 16, 33]))
    o = {
        "block_k": block_k,
        "budget": block_k * draw(st.sampled_from([1, 2, 5, 8, 16])),
        "block_q": draw(st.sampled_from([1, 4, 16, 64])),
        "stride_q": draw(st.sampled_from([1, 2, 2, 3, 100])),
        "representative": draw(st.sampled_from(["first", "middle", "last"])),
        "num_sink": draw(st.sampled_from([0, 0, 1, 16])),
        "num_recent": draw(st.sampled_from([0, 1, 7, 40])),
        "bound": draw(st.sampled_from(["sample", "sample", "minmax"])),
        "causal": draw(st.booleans()),
        "head_reduce": draw(st.sampled_from(["none", "group_max"])),
    }
    heads = kv_heads if o["head_reduce"] == "group_max" else kv_heads * group
    o["block_q"] = max(o["block_q"], -(-queries * batch * heads // max_lists))
    q = whole((batch, queries, kv_heads * group, dim), generator, dtype)
    k = whole((batch, tokens, kv_heads, dim), generator, dtype)
    if draw(st.sampled_from([False, False, True])) and tokens:
        k[0, draw(st.integers(0, tokens - 1)) :: 3, 0, 0] = NAN
    if draw(st.booleans()):
        lengths = [draw(st.integers(0, tokens)) for _ in range(batch)]
        o["seqlens_k"] = torch.tensor(lengths, dtype=torch.int32)
    if draw(st.booleans()) and o["bound"] == "sample":
        o["restart_span"] = draw(st.sampled_from([1, 2, 3, 8, 1000]))
        shape = (batch, heads, -(-queries // o["block_q"]), o["budget"] // block_k)
        ids = torch.randint(-2, tokens // block_k + 3, shape, generator=generator)
        if draw(st.booleans()):
            ids = ids.sort()[0]
        counts = torch.randint(-1, shape[-1] + 2, shape[:-1], generator=generator)
        o["start"] = (ids.int(), counts.int())
    cache = k
    if draw(st.booleans()):
        size = draw(st.sampled_from([1, 4, 16]))
        pages = -(-tokens // size)
        table = torch.randperm(batch * pages + 1, generator=generator)[: batch * pages].int()
        o["block_table"] = table.view(batch, pages)
        padded = torch.zeros(batch, pages * size, kv_heads, dim, dtype=dtype)
        padded[:, :tokens] = k
        cache = torch.full((batch * pages + 1, size, kv_heads, dim), NAN, dtype=dtype)
        cache[table.long()] = padded.unflatten(1, (pages, size)).flatten(0, 1)
        o.setdefault("seqlens_k", torch.full((batch,), tokens, dtype=torch.int32))
    return q, k, cache, o


def check_lists(call, backend):
    """Checks I2 (unique), I3, I4 and I8, and the oracle's blocks."""
    q, k, cache, o = call
    found = select(q, cache, backend, **o)
    indices, counts = found
    assert indices.dtype == counts.dtype == torch.int32
    for again in (select(q, cache, backend, **o), select(q, cache, "reference", **o)):
        assert torch.equal(indices, again[0]) and torch.equal(counts, again[1])
    o = {**o, "queries": q.shape[1]}
    lengths = o.get("seqlens_k", torch.full((len(q),), k.shape[1]))
    for b, h, r in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        first, until = admissible(o, q.shape[1], int(lengths[b]), r)
        held = indices[b, h, r, : counts[b, h, r]].tolist()
        assert held == sorted(set(held)) and all(first <= i < until for i in held)
        assert (indices[b, h, r, len(held) :] == -1).all()
        wanted = min(until - first, o["budget"] // o["block_k"])
        if "start" in o:
            assert len(held) <= wanted and (len(held) > 0) == (wanted > 0)
        else:
            assert len(held) == wanted


@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
@examples(60)
@given(call=calls())
def test_lists_on_every_instruction_set(call, backend, isa):
    check_lists(call, backend)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "cpu"])
@examples(40)
@given(call=calls(longest=150, max_lists=16))
def test_lists(call, backend):
    check_lists(call, backend)


@each_backend
@examples(25)
@given(data=st.data())
def test_a_budget_that_suffices_leaves_nothing_out(data, backend):
    """I1 and I2: list, first and last keys together are all that any query sees."""
    queries, tokens = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    o = {
        "block_q": data.draw(st.sampled_from([1, 8, 16])),
        "block_k": data.draw(st.sampled_from([1, 2, 5])),
        "num_sink": data.draw(st.integers(0, 9)),
        "num_recent": data.draw(st.integers(0, 20)),
        "causal": data.draw(st.booleans()),
    }
    o["budget"] = o["block_k"] * -(-tokens // o["block_k"])
    q, k = torch.randn(1, queries, 1, 8), torch.randn(1, tokens, 1, 8)
    indices, counts = select(q, k, backend, **o)
    for i in range(queries):
        seen = range(tokens - queries + i + 1 if o["causal"] else tokens)
        held = set(range(o["num_sink"])) | set(seen[max(len(seen) - o["num_recent"], 0) :])
        row = i // o["block_q"]
        for block in indices[0, 0, row, : counts[0, 0, row]].tolist():
            held |= set(range(block * o["block_k"], (block + 1) * o["block_k"]))
        assert held >= set(seen)


def block_scores(q, k, o):
    """Scores of the admissible blocks of the only list and query block, in plain Python."""
    first, until = admissible(o, q.shape[1], k.shape[1], 0)
    rows = range(q.shape[1] - 1, -1, -o["stride_q"])
    scores = {}
    for block in range(first, until):
        scores[block] = -float("inf")
        for i in rows:
            end = (k.shape[1] - q.shape[1] + i + 1 if o["causal"] else k.shape[1]) - o["num_recent"]
            keys = range(max(block * o["block_k"], o["num_sink"]), (block + 1) * o["block_k"])
            for j in keys:
                if j < end:
                    products = (q[0, i].double() * k[0, j].double()).sum(-1)
                    scores[block] = max([scores[block], *products.tolist()])
    return scores


def best_of(scores, wanted):
    return sorted(sorted(scores, key=lambda block: (-scores[block], block))[:wanted])


SMALL = {"block_q": 16, "block_k": 2, "stride_q": 2, "num_sink": 4, "num_recent": 6, "causal": True}


@each_backend
@examples(15)
@given(seed=st.integers(0, 2**31), wanted=st.integers(1, 20), tokens=st.integers(20, 130))
def test_exact_mode_is_exact(seed, wanted, tokens, backend):
    generator = torch.Generator().manual_seed(seed)
    q, k = whole((1, 9, 1, 8), generator), whole((1, tokens, 1, 8), generator)
    indices, counts = select(q, k, backend, **SMALL, budget=2 * wanted, bound="minmax")
    found = indices[0, 0, 0, : counts[0, 0, 0]].tolist()
    assert found == best_of(block_scores(q, k, SMALL), wanted)


@each_backend
@examples(15)
@given(seed=st.integers(0, 2**31), wanted=st.integers(1, 12))
def test_the_best_representative_stays(seed, wanted, backend):
    """I5: with "first", no block better than a result of the first step is lost."""
    generator = torch.Generator().manual_seed(seed)
    q, k = whole((1, 5, 1, 8), generator), whole((1, 150, 1, 8), generator)
    o = {**SMALL, "budget": 2 * wanted, "representative": "first"}
    indices, counts = select(q, k, backend, **o)
    scores = block_scores(q, k, SMALL)
    first, n = min(scores), len(scores)
    ends = [first + n * i // wanted for i in range(wanted + 1)]
    looked_at = [*ends[:-1], *((a + (b - a) // 2) for a, b in itertools.pairwise(ends))]
    found = [scores[i] for i in indices[0, 0, 0, : counts[0, 0, 0]].tolist()]
    assert max(found) >= max(scores[i] for i in looked_at)


@each_backend
@pytest.mark.parametrize("representative", ["first", "middle", "last"])
@examples(15)
@given(seed=st.integers(0, 2**31), wanted=st.integers(1, 12), tokens=st.integers(40, 200))
def test_keys_that_are_alike_in_each_first_node_are_found(
    seed, wanted, tokens, representative, backend
):
    """I6: keys that are equal within each initial node are found."""
    generator = torch.Generator().manual_seed(seed)
    o = {**SMALL, "block_q": 1, "num_sink": 0, "num_recent": 0}
    tokens -= tokens % 2
    n = tokens // 2
    q, k = whole((1, 1, 1, 8), generator), torch.zeros(1, tokens, 1, 8)
    for i in range(wanted):
        k[0, 2 * (n * i // wanted) : 2 * (n * (i + 1) // wanted)] = whole((1, 8), generator)
    indices, counts = select(q, k, backend, **o, budget=2 * wanted, representative=representative)
    scores = block_scores(q, k, o)
    found = sorted(scores[i] for i in indices[0, 0, 0, : counts[0, 0, 0]].tolist())
    assert found == sorted(scores[i] for i in best_of(scores, wanted))


def peak_found(peak, wanted, slopes, backend):
    j = torch.arange(300.0)
    k = torch.where(j < peak, (j - peak) * slopes[0], (peak - j) * slopes[1])[None, :, None, None]
    o = {**SMALL, "num_sink": 0, "num_recent": 0, "block_k": 1}
    indices, _ = select(torch.ones(1, 1, 1, 1), k, backend, **o, budget=wanted)
    return peak in indices


@each_backend
@examples(20)
@given(
    peak=st.integers(0, 299), more=st.integers(1, 12), slopes=st.tuples(*[st.integers(1, 5)] * 2)
)
def test_a_peak_is_found(peak, more, slopes, backend):
    """I6: one rising and one falling slope; their ratio is at most the number of other blocks.

    At each level, the block's node has the nearest representative on its side of the peak. Nodes of
    s or s + 1 blocks put the n-th of the other side at (n - 1/2) s or farther, and its own at
    (s + 1) / 2 or nearer: at most as many nodes as the ratio of the slopes come before it.
    """
    assert peak_found(peak, more - (-max(slopes) // min(slopes)), slopes, backend)


@each_backend
def test_a_peak_with_one_steep_side_can_be_missed(backend):
    """Two nodes lie on the gentle side, and the representative of the peak's node on the steep
    side."""
    assert not peak_found(4, 2, (1, 3), backend)
    assert peak_found(4, 3, (1, 3), backend)


@each_backend
def test_an_isolated_spike_can_be_missed(backend):
    """Only bound="minmax" gives a worst-case guarantee."""
    q, k = torch.ones(1, 1, 1, 4), torch.zeros(1, 1000, 1, 4)
    k[0, 777] = 100
    o = {**SMALL, "budget": 16}
    assert 777 // 2 not in select(q, k, backend, **o)[0]
    assert 777 // 2 in select(q, k, backend, **o, bound="minmax")[0]


@each_backend
def test_orders_and_unseen_keys_do_not_matter(backend):
    """I7: lists do not depend on the order of requests and heads, or on unseen rows."""
    generator = torch.Generator().manual_seed(0)
    q, k = whole((3, 30, 6, 16), generator), whole((3, 250, 2, 16), generator)
    lengths = torch.tensor([250, 20, 131], dtype=torch.int32)
    o = {**SMALL, "budget": 32, "seqlens_k": lengths}
    indices, counts = select(q, k, backend, **o)
    batch, heads = torch.tensor([2, 0, 1]), torch.tensor([4, 5, 3, 1, 2, 0])
    moved = {**o, "seqlens_k": lengths[batch]}
    there = select(q[batch][:, :, heads], k[batch][:, :, [1, 0]], backend, **moved)
    assert torch.equal(there[0], indices[batch][:, heads])
    assert torch.equal(there[1], counts[batch][:, heads])
    k[1, 20:], k[2, 131:] = NAN, NAN  # beyond the lengths
    q[1, :10] = NAN  # before the first key: 20 keys for 30 queries
    again = select(q, k, backend, **o)
    assert torch.equal(again[0], indices) and torch.equal(again[1], counts)


def recall(k, q, wanted, backend):
    o = {**SMALL, "block_q": 1, "num_sink": 0, "num_recent": 0, "budget": 2 * wanted}
    found, best = (
        select(q, k, backend, **o, bound=bound)[0].flatten(0, 2) for bound in ("sample", "minmax")
    )
    shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), best.tolist(), strict=True)]
    return sum(shared) / best.numel()


@each_backend
def test_recall_is_that_of_chance_or_better(backend):
    """I9: independent keys, then keys that resemble their neighbors."""
    generator = torch.Generator().manual_seed(0)
    lists, tokens, wanted = (24, 512, 32) if backend in ("cpu", "reference") else (8, 256, 16)
    chance = wanted / (tokens // 2)
    q = torch.randn(1, 1, lists, 16, generator=generator)
    noise = torch.randn(1, tokens, lists, 16, generator=generator)
    assert recall(noise, q, wanted, backend) >= chance - 0.03
    smooth = noise.clone()
    for t in range(1, tokens):
        smooth[:, t] = 0.97 * smooth[:, t - 1] + (1 - 0.97**2) ** 0.5 * noise[:, t]
    assert recall(smooth, q, wanted, backend) > 3 * chance


@each_backend
def test_decoding_selects_what_prefill_does(backend):
    generator = torch.Generator().manual_seed(0)
    q, k = whole((1, 40, 2, 16), generator), whole((1, 190, 1, 16), generator)
    o = {**SMALL, "block_q": 1, "budget": 16}
    indices, counts = select(q, k, backend, **o)
    for i in (0, 17, 39):
        one = select(q[:, i : i + 1], k[:, : 151 + i], backend, **o)
        assert torch.equal(one[0], indices[:, :, i : i + 1])
        assert torch.equal(one[1], counts[:, :, i : i + 1])


@pytest.mark.parametrize(("form", "backend"), forms(backends("reference")))
def test_a_request_has_the_lists_that_it_has_alone(form, backend):
    """List rows that belong to no request are empty."""
    o = {**SMALL, "budget": 16, "head_reduce": "group_max"}
    requests = Requests(form, backend)
    indices, counts = select(*requests.tensors[:2], backend, **o, **requests.options)
    taken = torch.zeros_like(counts)
    for b, (q, k, _) in enumerate(requests.alone):
        own = requests.lists(b, o["block_q"])
        alone = [t[0] for t in select(q, k, backend, **o)]
        assert torch.equal(indices[own], alone[0]) and torch.equal(counts[own], alone[1])
        taken[own] = 1
    assert (indices[taken == 0] == -1).all() and (counts[taken == 0] == 0).all()


@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cuda", "emulated")])
def test_blocks_of_few_warps_find_what_those_of_many_do(backend):
    """Lists have many warps each while an SM has one list."""
    q, k = torch.randn(1, 1, 160, 4), torch.randn(1, 60, 160, 4)
    o = {**SMALL, "budget": 16}
    indices, counts = select(q, k, backend, **o)
    for few in (slice(0, 3), slice(157, 160)):
        own = select(q[:, :, few], k[:, :, few], backend, **o)
        assert torch.equal(own[0], indices[:, few]) and torch.equal(own[1], counts[:, few])


@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cuda", "emulated")])
@pytest.mark.parametrize("wrong", [(3, 9, 2, 30), (0, 40, 0, 40), (-(2**31), 2**31 - 1, 5, -1)])
def test_wrong_ends_lead_nowhere_else(wrong, backend):
    q, k = torch.randn(40, 2, 8), torch.randn(60, 1, 8)
    o = {**SMALL, "block_q": 8, "budget": 8}
    wrong = torch.tensor(wrong, dtype=torch.int32)
    for cu_seqlens in ((wrong, ends((20, 20, 20))), (ends((9, 31, 0)), wrong)):
        at = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=True))
        indices, counts = select(q, k, backend, **o, **at)
        assert ((indices >= -1) & (indices < 30)).all()
        assert ((indices >= 0).sum(-1) == counts).all()


@pytest.mark.parametrize("paged", [False, True], ids=["whole", "paged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
def test_the_end_of_a_long_prefill(backend, isa, dtype, paged):
    """Keys read by many query blocks are copied, others are read in place: the bits are the
    same."""
    generator = torch.Generator().manual_seed(0)
    tokens, last = 8200, 200  # whole query blocks, and one of 8 queries
    q = torch.randn(1, tokens, 2, 5, generator=generator).to(dtype)
    k = torch.randn(1, 129 * 64, 1, 5, generator=generator).to(dtype)
    options = {"block_k": 8, "budget": 2048, "num_recent": 32}
    if paged:
        order = torch.randperm(129, generator=generator)
        k = k.view(129, 64, 1, 5)[order]
        options["block_table"] = order.argsort().int()[None]
        options["seqlens_k"] = torch.tensor([tokens], dtype=torch.int32)
    else:
        k = k[:, :tokens]
    whole_lists = select(q, k, backend, **options)
    lists = select(q[:, tokens - last :], k, backend, **options)
    for own, all_of_them in zip(lists, whole_lists, strict=True):
        assert torch.equal(own, all_of_them[:, :, tokens // 64 + 1 - own.shape[2] :])


@each_backend
def test_a_list_goes_on_from_itself(backend):
    """Nodes of one block stay; nodes of two or more blocks contain the blocks of the list."""
    generator = torch.Generator().manual_seed(0)
    q, k = whole((1, 1, 2, 16), generator), whole((1, 800, 2, 16), generator)
    o = {**SMALL, "budget": 32}
    start = select(q, k, backend, **o)
    same = select(q, k, backend, **o, start=start, restart_span=1)
    assert torch.equal(start[0], same[0])
    exact = select(q, k, backend, **o, bound="minmax")
    wide = select(q, k, backend, **o, start=start, restart_span=4)
    groups = [set((x // 4).tolist()) for x in start[0][0, :, 0]]
    assert all(set((x // 4).tolist()) <= g for x, g in zip(wide[0][0, :, 0], groups, strict=True))
    refined = select(q, k, backend, **o, start=exact, restart_span=1)
    assert torch.equal(refined[0], exact[0])


@each_backend
def test_nan_comes_after_every_number(backend):
    q, k = torch.ones(1, 1, 1, 4), torch.full((1, 100, 1, 4), NAN)
    k[0, ::7] = -1.0
    o = {**SMALL, "block_k": 1, "num_sink": 0, "num_recent": 0, "bound": "minmax"}
    numbers = list(range(0, 100, 7))
    assert select(q, k, backend, **o, budget=15)[0].flatten().tolist() == numbers
    more = select(q, k, backend, **o, budget=17)[0].flatten().tolist()
    assert more == sorted([*numbers, 1, 2])


@pytest.mark.parametrize("heads", [6, 24], ids=["every block", "the first levels"])
@pytest.mark.parametrize("representative", ["first", "middle", "last"])
@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cuda", "emulated")])
def test_nodes_scored_ahead_change_no_list(backend, representative, heads, monkeypatch):
    """6 lists leave 132 SMs room for four levels of a tree of five, 24 lists for two; the second
    request has a tree of two levels, the third none."""
    generator = torch.Generator().manual_seed(3)
    q, k = (whole((3, n, heads // 3, 8), generator) for n in (1, 210))
    k[1, ::9, 0] = NAN
    o = {
        **SMALL, "block_k": 1, "budget": 8, "num_sink": 3, "num_recent": 2,
        "representative": representative,
        "seqlens_k": torch.tensor([210, 34, 11], dtype=torch.int32),
    }  # fmt: skip
    want = select(q, k, "reference", **o)
    monkeypatch.setenv("TOKENMILL_CHECK", "1")
    found = [select(q, k, backend, **o)]
    if backend == "emulated":
        from tokenmill import _emulator

        with _emulator.configured("order=reverse"), _emulator.counting() as launches:
            found.append(select(q, k, backend, **o))
        assert len(launches) == 2
    for lists in found:
        assert all(torch.equal(a, b) for a, b in zip(lists, want, strict=True))


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_pages_out_of_range_count_as_zeros(backend):
    q, k = torch.ones(1, 1, 1, 8), -torch.ones(3, 4, 1, 8)
    table = torch.tensor([[0, 1, -1, 3, 2**31 - 1, 2]], dtype=torch.int32)
    o = {**SMALL, "block_k": 4, "num_sink": 0, "num_recent": 0, "block_table": table}
    for bound in ("sample", "minmax"):
        assert select(q, k, backend, **o, budget=12, bound=bound)[0].flatten().tolist() == [2, 3, 4]


def test_gradients_are_not_asked_for():
    q, k = (torch.randn(1, 9, 1, 8, requires_grad=True) for _ in range(2))
    assert not tm.hip_block_select(q, k)[0].requires_grad
