"""indexer_topk_select: the definition in loops, lists that do not depend on the work partition, and
values that could only be refused by synchronizing."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, each_kernel, ints
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm
from tokenmill.testing import map_tensors

INF, NAN = float("inf"), float("nan")


def one_list(scores, topk, block_k):
    """List from the scores of keys by position."""
    blocks: dict[int, list[float]] = {}
    for j, x in scores.items():
        blocks.setdefault(j // block_k, []).append(x)
    best = {b: NAN if any(x != x for x in row) else max(row) for b, row in blocks.items()}
    order = sorted((b for b, x in best.items() if x > -INF), key=lambda b: (-best[b], b))
    return {b: best[b] for b in sorted(order[:topk])}


def by_definition(q, k, weights, topk, o):
    """One sequence: q [Sq, H, D], k [n, D], weights [Sq, H]. Returns a dict per query."""
    queries, n = len(q), len(k)
    lists = []
    for i in range(queries):
        end = min(n, i + n - queries + 1 if o["causal"] else n) - o["num_recent"]
        scores = {}
        for j in range(o["num_sink"], max(end, 0)):
            z = (q[i].double() @ k[j].double()).tolist()
            if o["activation"] == "relu":
                z = [x if x != x else max(x, 0.0) for x in z]
            scores[j] = sum(w * x for w, x in zip(weights[i].tolist(), z, strict=True))
        lists.append(one_list(scores, topk, o["block_k"]))
    return lists


@st.composite
def calls(draw, longest):
    """Draws arguments, options and the sequences: slices of queries, and keys."""
    number = st.integers
    generator = torch.Generator().manual_seed(draw(number(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    heads, dim = draw(st.sampled_from([1, 2, 3, 7, 9])), draw(st.sampled_from([1, 8, 20, 33]))
    largest = draw(st.sampled_from([1, 4]))  # 1: many ties

    def whole(*shape, low=-largest):
        return torch.randint(low, largest + 1, shape, generator=generator).to(dtype)

    def spread(t):  # rows with gaps
        return torch.nn.functional.pad(t, (1, 2))[..., 1 : 1 + t.shape[-1]]

    batch = draw(number(1, 3))
    lengths = [draw(number(0, longest)) for _ in range(batch)]
    options = {
        "causal": draw(st.booleans()),
        "activation": draw(st.sampled_from(["relu", "none"])),
        "block_k": draw(st.sampled_from([1, 1, 2, 5, 16, 2**31 - 1])),
        "num_sink": draw(st.sampled_from([0, 0, 3, 70])),
        "num_recent": draw(st.sampled_from([0, 0, 2, 70])),
    }
    packed_q, keys_in = draw(st.booleans()), draw(st.sampled_from(["rows", "pages", "packed"]))
    packed_q = packed_q or keys_in == "packed"
    queries = (
        [draw(number(0, 9)) for _ in range(batch)] if packed_q else [draw(number(1, 9))] * batch
    )
    starts = [sum(queries[:b]) for b in range(batch + 1)]
    lead = (starts[-1],) if packed_q else (batch, queries[0])
    q = whole(*lead, heads, dim)
    weights = whole(*lead, heads, low=-1)
    if draw(st.booleans()):
        weights = weights.float()
    keys = [whole(n, dim) for n in lengths]
    if draw(number(0, 3)) == 0 and sum(lengths):
        row = next(x for x in keys if len(x))
        row[draw(number(0, len(row) - 1)), draw(number(0, dim - 1))] = draw(
            st.sampled_from([NAN, INF, -INF])
        )
    if float8 := draw(st.booleans()):
        keys = [x.to(torch.float8_e4m3fn) for x in keys]
        odd = torch.tensor([1, 1, 2, 0.25, -1, 0, NAN, INF])
        scales = [odd[torch.randint(8, x.shape[:1], generator=generator)] for x in keys]
    if packed_q:
        options["cu_seqlens_q"] = ints(*starts)
    if keys_in == "packed":
        k, k_scale = torch.cat(keys), torch.cat(scales) if float8 else None
        options["cu_seqlens_k"] = ints(*(sum(lengths[:b]) for b in range(batch + 1)))
    else:
        size = draw(st.sampled_from([1, 4, 7])) if keys_in == "pages" else max(*lengths, 1)
        pages = [-(-max(lengths) // size)] * batch if keys_in == "pages" else [1] * batch
        table = torch.randperm(sum(pages), generator=generator).view(batch, -1).int()
        k = whole(max(sum(pages), 1), size, dim).to(keys[0].dtype)
        k_scale = torch.full(k.shape[:2], NAN)
        for b, (row, own) in enumerate(zip(table, keys, strict=True)):
            for t in range(len(own)):
                k[row[t // size], t % size] = own[t]
                if float8:
                    k_scale[row[t // size], t % size] = scales[b][t]
        options["seqlens_k"] = ints(*lengths)
        if keys_in == "pages":
            options["block_table"] = table
        else:
            k, k_scale = k[table[:, 0].long()], k_scale[table[:, 0].long()]
    if float8:
        options["k_scale"] = k_scale
        finite = [torch.where(s.isfinite(), s, NAN)[:, None] for s in scales]
        keys = [x.double() * s for x, s in zip(keys, finite, strict=True)]
    if draw(st.booleans()):
        q, k = spread(q), spread(k.view(torch.uint8)).view(k.dtype) if float8 else spread(k)
    flat = q.flatten(0, -3), weights.flatten(0, -2)
    sequences = [
        (*(t[a : a + n] for t in flat), x) for a, n, x in zip(starts, queries, keys, strict=False)
    ]
    return (q, k, weights, draw(st.sampled_from([1, 3, 12, 90]))), options, sequences


def check(call, backend):
    args, options, sequences = call
    topk = args[3]
    wanted = [row for q, w, k in sequences for row in by_definition(q, k, w, topk, options)]
    there = map_tensors((args, options), lambda t: t.to(device_of(backend)))
    found = tm.indexer_topk_select(*there[0], **there[1], return_values=True, backend=backend)
    indices, counts, values = (t.cpu().flatten(0, args[0].dim() - 3) for t in found)
    assert counts.tolist() == [len(row) for row in wanted]
    for row, ids, scores in zip(wanted, indices.tolist(), values.tolist(), strict=True):
        empty = topk - len(row)
        assert ids == [*row, *[-1] * empty]
        assert scores == [*row.values(), *[-INF] * empty]


@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
@examples(60)
@given(call=calls(longest=150))
def test_definition_on_every_instruction_set(call, backend, isa):
    check(call, backend)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "cpu"])
@examples(25)
@given(call=calls(longest=40))
def test_definition(call, backend):
    check(call, backend)


def row_of_scores(order, n):
    """One head and one key per score, in the order of [1, 1, n] keys."""
    x = {
        "ascending": torch.arange(n),
        "descending": n - torch.arange(n),
        "equal": torch.full((n,), 3),
        "few": torch.arange(n) * 7919 % 11,
        "mixed": torch.arange(n) * 7919 % n,
    }[order]
    q = torch.ones(1, 1, 1, 2)
    return q, torch.stack([x // 128 * 128.0, x % 128 * 1.0], 1)[None], torch.ones(1, 1, 1), x


@pytest.mark.parametrize("scores", ["whole", "few", "zero", "none"])
def test_no_hint_changes_a_list(scores, threads):
    """Hints are good, wrong, short or not key numbers at all, on a CPU in one part and in
    several."""
    n, topk, generator = 12_000, 40, torch.Generator().manual_seed(6)
    largest = {"whole": 400, "few": 2, "zero": 0, "none": 1}[scores]
    k = torch.randint(-largest, largest + 1, (2, n, 4), generator=generator).float()
    q, weights = torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3)
    if scores == "none":
        k[:, torch.randperm(n, generator=generator)[: n - topk // 2]] = NAN
    seen = {"num_sink": 3, "num_recent": 5, "seqlens_k": ints(n, n - 7)}
    wanted = tm.indexer_topk_select(q, k, weights, topk, **seen, return_values=True, backend="cpu")
    good = tm.indexer_topk_select(q, k, weights, 2 * topk, **seen, backend="cpu")[0]
    strange = torch.randint(-(2**31), 2**31, (2, 1, 300), generator=generator).int()
    even = torch.arange(0, n, 17)[:700].int().expand(2, 1, -1)
    hints = (wanted[0], good, good.flip(-1), good[..., :topk], good[..., :7], strange, even,
             even // 3, even + n - 60, wanted[0] * 0 - 1)  # fmt: skip
    for count in (1, 3):
        threads(count)
        for hint in hints:
            found = tm.indexer_topk_select(
                q, k, weights, topk, **seen, return_values=True, previous=hint, backend="cpu"
            )
            assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "triton"])
@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "few", "mixed"])
def test_more_candidates_than_are_kept(order, backend, threads):
    """This holds for any order of the scores and any number of parts."""
    n, topk = 40_001, 300
    *args, scores = row_of_scores(order, n)
    best = scores.argsort(stable=True, descending=True)[:topk].sort()[0]
    for count in (1, 3, 8) if backend == "cpu" else (1,):
        threads(count)
        args = [t.to(device_of(backend)) for t in args]
        indices, counts = tm.indexer_topk_select(*args, topk, backend=backend)
        assert counts.item() == topk and torch.equal(indices.cpu().flatten(), best.int())


@each_kernel
def test_queries_in_stripes(backend, monkeypatch):
    """GPUs score the queries in stripes if their rows are long."""
    queries, n = 70, 8400
    if backend == "triton":
        module = pytest.importorskip("tokenmill.triton_kernels.select.indexer_topk_select")
        monkeypatch.setattr(module, "SPARE_SCORES", 0)
        monkeypatch.setattr(module, "MIN_ROWS", 2)
        queries, n = 5, 150
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-3, 4, (1, queries, 1, 8), generator=generator).half()
    k = torch.randint(-3, 4, (1, n, 8), generator=generator).half()
    weights = torch.ones(1, queries, 1)
    for block_k in (1, 3):
        want = tm.indexer_topk_select(q, k, weights, 5, block_k=block_k, backend="reference")
        args = [t.to(device_of(backend)) for t in (q, k, weights)]
        found = tm.indexer_topk_select(*args, 5, block_k=block_k, backend=backend)
        for a, b in zip(want, found, strict=True):
            assert torch.equal(a, b.cpu())


@each_kernel
def test_a_long_sequence_among_short_ones(backend):
    """The CUDA grid is sized for sequences of the mean length, and its CTAs take the rest in
    turn."""
    generator = torch.Generator().manual_seed(4)
    ends_q, ends_k = ints(0, 1, 4, 6, 7), ints(0, 3, 700, 705, 710)
    q = torch.randint(-3, 4, (7, 2, 8), generator=generator).half()
    k = torch.randint(-3, 4, (710, 8), generator=generator).half()
    weights = torch.ones(7, 2)
    ends = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k}
    want = tm.indexer_topk_select(q, k, weights, 30, **ends, backend="reference")
    args, ends = map_tensors(((q, k, weights), ends), lambda t: t.to(device_of(backend)))
    found = tm.indexer_topk_select(*args, 30, **ends, backend=backend)
    for a, b in zip(want, found, strict=True):
        assert torch.equal(a, b.cpu())


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_random_numbers(dtype, backend):
    """Values keep the error budget, and no key outside a list clearly exceeds the keys in it."""
    generator = torch.Generator().manual_seed(1)
    heads, n, topk = 8, 200 if backend == "triton" else 1500, 50
    q = torch.randn(1, 3, heads, 64, generator=generator).to(dtype)
    k = torch.randn(1, n, 64, generator=generator).to(dtype)
    weights = torch.randn(1, 3, heads, generator=generator)
    args = [t.to(device_of(backend)) for t in (q, k, weights)]
    found = tm.indexer_topk_select(*args, topk, return_values=True, causal=False, backend=backend)
    indices, counts, values = (t.cpu() for t in found)
    z = torch.einsum("bihd,bjd->bihj", q.double(), k.double()).relu()
    scores = (weights.double()[..., None] * z).sum(2)
    assert (counts == topk).all()
    tolerance = 1e-5 * scores.abs().max()
    assert (scores.gather(2, indices.long()) - values).abs().max() < tolerance
    rest = scores.scatter(2, indices.long(), -INF)
    assert (rest.amax(2) - values.amin(2)).max() < 2 * tolerance


@pytest.mark.parametrize(
    ("backend", "isa"), [*cpu_variants(), ("reference", None)], indirect=["isa"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_code_of_float8(dtype, backend, isa):
    """Each code is multiplied by its scale, in the first, the middle and the last dimension."""
    codes, device = torch.arange(256, dtype=torch.uint8), device_of(backend)
    for dim, at in ((1, 0), (8, 3), (21, 20)):
        k = torch.zeros(1, 256, dim, dtype=torch.uint8)
        k[0, :, at] = codes
        k = k.view(torch.float8_e4m3fn)
        q = torch.zeros(1, 1, 1, dim)
        q[..., at] = 1
        scale = torch.rand(1, 256, generator=torch.Generator().manual_seed(0)) - 0.5
        want = k[0, :, at].float() * scale[0]
        args = [t.to(device) for t in (q.to(dtype), k, torch.ones(1, 1, 1))]
        ids, counts, values = tm.indexer_topk_select(
            *args, 256, causal=False, activation="none", k_scale=scale.to(device),
            return_values=True, backend=backend,
        )  # fmt: skip
        assert ids[0, 0, :254].tolist() == (~want.isnan()).nonzero().flatten().tolist()
        assert counts.item() == 254 and torch.equal(values[0, 0, :254].cpu(), want[~want.isnan()])


@each_backend
def test_keys_of_a_float8_cache(backend):
    """kv_cache_append writes the keys and their scales; lists match the contents of the cache."""
    generator = torch.Generator().manual_seed(5)
    k = torch.randn(40, 1, 32, generator=generator)
    q, weights = torch.randn(1, 3, 4, 32, generator=generator), torch.ones(1, 3, 4)
    cache = torch.zeros(2, 6, 8, 1, 32).to(torch.float8_e4m3fn)
    scale, slots = torch.zeros(6, 8, 1), torch.arange(48).view(6, 8).flip(0).flatten()[:40]
    tm.kv_cache_append(*cache, k, k, slots, k_scale=scale, backend="reference")
    pages, table = cache[0, :, :, 0], ints(5, 4, 3, 2, 1)[None]
    rows = (pages.float() * scale).flip(0)[:5].reshape(1, 40, 32)
    want = tm.indexer_topk_select(q, rows, weights, 9, return_values=True, backend="reference")
    args = [t.to(device_of(backend)) for t in (q, pages, weights, table, scale[..., 0])]
    found = tm.indexer_topk_select(
        *args[:3], 9, block_table=args[3], k_scale=args[4], return_values=True, backend=backend
    )
    assert torch.equal(want[0], found[0].cpu())
    torch.testing.assert_close(found[2].cpu(), want[2])


@each_backend
def test_it_is_the_scores_of_a_cache_and_a_selection(backend):
    """With one head, kv_block_scores and topk_select give the same blocks."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randint(-3, 4, (2, 1, 1, 16), generator=generator).float()
    k = torch.randint(-3, 4, (2, 90, 16), generator=generator).float()
    q, k, lengths = (t.to(device_of(backend)) for t in (q, k, ints(77, 31)))
    ends = {"num_sink": 5, "num_recent": 9, "seqlens_k": lengths, "block_k": 4}
    scores = tm.kv_block_scores(
        q, k[:, :, None], scoring="max_block", scale=1.0, **ends, backend=backend
    )
    want = tm.topk_select(scores.view(2, -1), 6, return_values=True, backend=backend)
    found = tm.indexer_topk_select(
        q, k, torch.ones_like(q[..., 0]), 6, activation="none", **ends, return_values=True,
        backend=backend,
    )  # fmt: skip
    for a, b in zip(want, found, strict=True):
        assert torch.equal(a, b.view_as(a))


def test_lists_are_those_of_block_sparse_attention():
    """Attention to listed keys equals attention with their mask (DeepSeek-V3.2-Exp, 2.1)."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 40, 2, 16, generator=generator) for _ in range(3))
    q_index, k_index = torch.randn(1, 40, 4, 8, generator=generator), k[:, :, 0, :8]
    indices, counts = tm.indexer_topk_select(q_index, k_index, torch.ones(1, 40, 4), 8)
    out = tm.block_sparse_attention(
        q, k, v, indices[:, None], counts[:, None], block_q=1, block_k=1, causal=True
    )
    listed = torch.zeros(1, 40, 41, dtype=torch.bool)
    listed.scatter_(2, torch.where(indices < 0, 40, indices).long(), True)
    want = tm.attention(q, k, v, bias=listed[:, None, :, :40])
    torch.testing.assert_close(out, want)


GPU = [b for b in backends() if b != "cpu"]


@pytest.mark.parametrize("backend", GPU)
def test_lengths_and_pages_out_of_range_are_clamped(backend):
    q, k, weights = torch.ones(4, 2, 1, 8), torch.ones(3, 4, 8), torch.ones(4, 2, 1)
    table = ints(0, 1, -1, 2, 3, 2**31 - 1, -(2**31), 2).view(4, 2)
    lengths = ints(-5, 2**31 - 1, 8, 6)
    args = [t.to(device_of(backend)) for t in (q, k, weights)]
    there = {"block_table": table.to(args[0].device), "seqlens_k": lengths.to(args[0].device)}
    indices, counts = tm.indexer_topk_select(*args, 9, **there, causal=False, backend=backend)
    seen = [[], [4, 5, 6, 7], [], [4, 5]]
    for row, ids in zip(seen, indices.tolist(), strict=True):
        assert ids == [[*row, *[-1] * (9 - len(row))]] * 2
    assert counts.tolist() == [[len(row)] * 2 for row in seen]


HOSTILE = [
    (3, 20, 20, 33), (0, 39, 0, 40), (9, 4, 30, 0), (0, 40, 0, 40), (-(2**31), 2**31 - 1, 0, 5),
    (2**31 - 1, -(2**31), 7, 7),
]  # fmt: skip


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("ends", HOSTILE)
def test_every_list_is_written_whatever_the_ends(ends, backend):
    q, k, weights = torch.ones(40, 1, 8), torch.ones(40, 8), torch.ones(40, 1)
    args = [t.to(device_of(backend)) for t in (q, k, weights)]
    at = ints(*ends).to(args[0].device)
    indices, counts = tm.indexer_topk_select(
        *args, 4, cu_seqlens_q=at, cu_seqlens_k=at, backend=backend
    )
    valid = torch.arange(4) < counts.cpu()[:, None]
    assert ((indices.cpu() >= 0) == valid).all() and (indices.cpu() < 40).all()
    if list(ends) == sorted(ends) and ends[0] >= 0 and ends[-1] <= 40:
        assert not counts[: ends[0]].any() and not counts[ends[-1] :].any()
        assert (counts[ends[0] : ends[-1]] > 0).all()


def test_weights_of_float32_stay_under_autocast():
    q, k, weights = torch.ones(1, 1, 1, 8), torch.ones(1, 1, 8), torch.full((1, 1, 1), 1 + 2**-10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype, want in ((torch.float32, 8 + 2**-7), (torch.float16, 8)):
            args = [t.to(dtype) for t in (q, k, weights)]
            assert tm.indexer_topk_select(*args, 1, return_values=True)[2].item() == want


def test_inputs_may_require_a_gradient():
    q, k = torch.randn(1, 3, 2, 8, requires_grad=True), torch.randn(1, 9, 8, requires_grad=True)
    values = tm.indexer_topk_select(q, k, torch.ones(1, 3, 2), 2, return_values=True)[2]
    assert not values.requires_grad
