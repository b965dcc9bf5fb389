"""sparse_decode_attention: any call, hostile lists, and memory that must not be read."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of, in_each_dtype
from each import DTYPES, each_backend, each_dtype, each_dtype_and_kernel, each_kernel, ints
from hypothesis import given
from hypothesis import strategies as st
from sparse_decode_calls import (
    INF,
    MAX,
    MIN,
    NAN,
    close,
    drawn,
    every_block,
    inside,
    moved,
    run,
    same,
)
from strategies import HEAD_DIMS, layouts
from tier import examples

from tokenmill import registry
from tokenmill.registry import Sample
from tokenmill.sparse.sparse_decode_attention_cases import rotations, sparse_call
from tokenmill.testing import compare

SPEC = registry.get("sparse_decode_attention")
GPU_KERNELS = [b for b in backends() if b != "cpu"]  # these do not check lengths


def spoil(indices, counts, kinds, g):
    """Makes lists invalid in several ways."""

    def some(shape):
        return torch.rand(shape, generator=g) < 0.3

    entries = indices.shape[2]
    for kind in kinds:
        hit = some(indices.shape)
        if kind == "unsorted" and entries:
            indices[:] = indices[..., torch.randperm(entries, generator=g)]
        elif kind == "repeated":
            indices[..., 1:] = torch.where(hit[..., 1:], indices[..., :-1], indices[..., 1:])
        elif kind == "negative":
            indices[hit] = torch.tensor([-1, -7, MIN])[
                torch.randint(3, (int(hit.sum()),), generator=g)
            ].int()
        elif kind == "huge":
            indices[hit] = torch.tensor([MAX, MAX // 2, 1 << 24])[
                torch.randint(3, (int(hit.sum()),), generator=g)
            ].int()
        elif kind == "counts":
            wrong = torch.tensor([-1, MIN, entries + 1, MAX])
            counts[:] = wrong[torch.randint(4, counts.shape, generator=g)].int()


def evict(caches, table, g):
    """Evicts pages, which then hold NaN."""
    gone = (torch.rand(table.shape, generator=g) < 0.3) & (table >= 0)
    for cache in caches:
        cache[table[gone].long()] = NAN
    table[gone] = -1


@st.composite
def sparse_samples(draw, longest):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 4), (1, 7), (2, 7)]))
    heads = kv_heads * group
    page_size = draw(st.sampled_from([None, None, 1, 16, 64]))
    capacity = draw(st.integers(0, longest // (page_size or 1))) * (page_size or 1)
    length = st.one_of(st.sampled_from([0, 1, 3, capacity]), st.integers(0, capacity))
    lengths = draw(st.lists(length.map(lambda n: min(n, capacity)), max_size=3))
    few = st.one_of(st.sampled_from([0, 0, 1, longest + 9]), st.integers(0, 40))
    d = draw(HEAD_DIMS)
    pairs = draw(st.one_of(st.just(0), st.integers(1, d // 2))) if d > 1 else 0
    mode = draw(st.sampled_from(["absolute", "cache"])) if pairs else "absolute"
    options = {
        "sq": draw(st.sampled_from([0, 1, 1, 1] + ([2, 5] if mode == "absolute" else []))),
        "h": heads,
        "hk": kv_heads,
        "d": d,
        "dv": draw(HEAD_DIMS),
        "lists": draw(st.sampled_from([1, kv_heads, heads])),
        "entries": draw(st.one_of(st.sampled_from([0, 1]), st.integers(0, 60))),
        "block_k": draw(st.sampled_from([1, 1, 1, 2, 4, 16, 32, 128])),
        "page_size": page_size,
        "capacity": capacity,
        "num_sink": draw(few),
        "num_recent": draw(few),
        "pairs": pairs,
        "pos_mode": mode,
        "extra": draw(st.sampled_from([0, 0, 1, 3, 40])),
        "counted": draw(st.booleans()),
        "return_mass": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.0, 0.3, -0.2, 1.5])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.5])),
        "num_splits": draw(st.sampled_from([0, 0, 1, 2, 3, 7, 20])),
    }
    interleaved = draw(st.booleans()) if pairs else False
    sink, evicted = draw(st.booleans()), page_size is not None and draw(st.booleans())
    kinds = draw(
        st.lists(
            st.sampled_from(["unsorted", "repeated", "negative", "huge", "counts"]), max_size=2
        )
    )
    layout, heads_first, strided = draw(st.integers(0, 2)), draw(st.booleans()), draw(st.booleans())

    def make(dtype, g):
        (q, k, v, indices, counts), kwargs = sparse_call(lengths, **options)(dtype, g)
        q = layouts(q.shape, dtype, g)[layout]()
        if pairs:
            kwargs["rope"] = rotations(max(capacity, 1), pairs)
            kwargs["interleaved"] = interleaved
        if sink:
            wide = torch.promote_types(dtype, torch.float32)
            kwargs["sink"] = torch.randn(heads, generator=g).to(wide)
        spoil(indices, counts, kinds, g)
        if evicted:
            evict((k, v), kwargs["block_table"], g)
        if heads_first:
            k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
        if strided:
            indices, counts = inside(indices, MAX), inside(counts, MAX)
            for name in ("rope", "extra_k", "extra_v", "extra_log_count", "block_table"):
                if name in kwargs:
                    kwargs[name] = inside(kwargs[name], 0)
        return (q, k, v, indices, counts), kwargs

    drawn_from = f"interleaved {interleaved} sink {sink} evicted {evicted} lists {kinds}"
    return Sample(f"{lengths} {options} {drawn_from} {layout} {heads_first} {strided}", make)


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(100)
@given(sample=sparse_samples(longest=200))
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", GPU_KERNELS)
@each_dtype
@examples(10)
@given(sample=sparse_samples(longest=130))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


def long_call(h, hk, lists, block_k, sq):
    longest = 2300 if "cpu" in backends() else 600
    call = sparse_call(
        (longest, 33, longest // 2 + 1), sq=sq, h=h, hk=hk, d=16, dv=16, lists=lists,
        entries=longest // block_k * 3 // 4, block_k=block_k, capacity=longest, num_sink=70,
        num_recent=50, extra=5, pairs=8,
    )  # fmt: skip
    return Sample(f"{h}/{hk} heads, {lists} lists, blocks of {block_k}, {sq} tokens", call)


LONG = (
    long_call(1, 1, 1, 1, 2),
    long_call(12, 3, 1, 1, 1),
    long_call(14, 2, 2, 1, 1),
    long_call(14, 2, 1, 8, 2),
    long_call(6, 3, 6, 1, 1),
    long_call(10, 10, 1, 1, 1),
)


@pytest.mark.parametrize(
    ("dtype", "backend", "isa"), in_each_dtype(DTYPES, cpu_variants()), indirect=["isa"]
)
@pytest.mark.parametrize("sample", LONG, ids=lambda s: s.name)
def test_long_lists_cross_every_border(sample, dtype, backend, isa):
    """Steps, key ranges, parts of the row, groups of heads; rows as narrow as one element."""
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok]


@each_dtype_and_kernel
@pytest.mark.parametrize("dims", [(96, 128), (256, 256), (160, 40)], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (5, 4), (20, 2)], ids=str)
def test_wide_heads_with_few_and_many_rows(dtype, rows, dims, backend):
    group, sq = rows
    call = sparse_call(
        (100, 37), sq=sq, h=group, hk=1, d=dims[0], dv=dims[1], lists=1, entries=50, capacity=100,
        num_recent=10, pairs=dims[0] // 2,
    )  # fmt: skip
    found = compare(SPEC, Sample("wide", call), backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok]


@each_dtype_and_kernel
@pytest.mark.parametrize("splits", [1, 2, 3, 10, 100])
def test_any_number_of_splits_keeps_the_error_budget(dtype, splits, backend):
    call = sparse_call(
        (300, 7, 129), sq=2, capacity=300, entries=150, num_sink=9, num_recent=40, extra=2,
        num_splits=splits,
    )  # fmt: skip
    found = compare(SPEC, Sample("splits", call), backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok]


@each_kernel
def test_mass_is_written_without_queries_and_without_keys(backend):
    for lengths, options in (((3,), {"sq": 0}), ((0, 0), {"capacity": 0}), ((5,), {"entries": 0})):
        args, kwargs = drawn(backend, lengths, **options)
        out, lse, mass = run(backend, args, kwargs)
        assert mass.shape == (len(lengths), 2, args[3].shape[2]) and torch.all(mass == 0)
        assert torch.all(out == 0) and torch.all(lse == -INF)


@each_kernel
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("splits", [1, 3])
def test_fixed_splits_make_a_request_independent_of_its_batch(splits, page_size, backend):
    args, kwargs = drawn(
        backend, (200, 31, 256, 0), entries=100, capacity=256, page_size=page_size,
        num_splits=splits, num_sink=5, num_recent=6,
    )  # fmt: skip
    together = run(backend, args, kwargs)
    for b in range(4):
        one = slice(b, b + 1)
        cut = one if page_size is None else slice(None)
        own = {"seqlens_k": kwargs["seqlens_k"][one]}
        if page_size is not None:
            own["block_table"] = kwargs["block_table"][one]
        alone = [args[0][one], args[1][cut], args[2][cut], args[3][one], args[4][one]]
        assert same([t[one] for t in together], run(backend, alone, kwargs, **own))


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
def test_automatic_ranges_on_the_cpu_depend_on_the_request_alone(dtype, backend, threads):
    args, kwargs = drawn(backend, (3000, 100), dtype, capacity=3000, entries=2500, num_recent=64)
    threads(2)
    together = run(backend, args, kwargs)
    threads(1)
    assert same(together, run(backend, args, kwargs))
    kwargs["seqlens_k"] = kwargs["seqlens_k"][:1]
    alone = run(backend, [a[:1] for a in args], kwargs)
    assert same([t[:1] for t in together], alone)


@each_kernel
@each_dtype
@pytest.mark.parametrize("sq", [1, 3])
@pytest.mark.parametrize("block_k", [1, 4])
def test_keys_that_no_query_sees_are_not_read(block_k, sq, dtype, backend):
    """NaN is in a block that a list names in part, in evicted pages, and after the request's
    keys."""
    lengths, page = (61, 30), 4
    args, kwargs = drawn(
        backend, lengths, dtype, sq=sq, lists=1, entries=8, block_k=block_k, page_size=page,
        capacity=64, num_sink=5, num_recent=6,
    )  # fmt: skip
    want = run(backend, args, kwargs)
    table = kwargs["block_table"]
    seen = torch.zeros(len(table), 64, dtype=torch.bool)
    for b, n in enumerate(lengths):
        seen[b, :5], seen[b, max(n - sq + 1 - 6, 0) : n] = True, True
        for i in args[3][b, 0, : args[4][b, 0]].tolist():
            seen[b, i * block_k : (i + 1) * block_k] = True
        seen[b, n:] = False
    for cache in args[1:3]:
        for b, n in enumerate(lengths):
            for j in range(n):
                if not seen[b, j]:
                    cache[table[b, j // page], j % page] = NAN
    assert same(run(backend, args, kwargs), want)


@each_kernel
@pytest.mark.parametrize("page_size", [None, 16])
def test_nan_stays_in_its_request(page_size, backend):
    args, kwargs = drawn(backend, (40, 40, 40), page_size=page_size, capacity=48, num_sink=4)
    want = run(backend, args, kwargs)
    page, row = (1, 3) if page_size is None else (int(kwargs["block_table"][1, 0]), 3)
    for cache in args[1:3]:
        cache[page, row] = NAN
    got = run(backend, args, kwargs)
    assert torch.isnan(got[0][1]).all()
    assert same([t[[0, 2]] for t in got], [t[[0, 2]] for t in want])


@each_backend
@pytest.mark.parametrize("sink", [None, 1.5])
def test_a_query_without_keys_is_zero(sink, backend):
    """Covers requests without a key, tokens before the first key of a request, and empty lists."""
    args, kwargs = drawn(backend, (0, 2, 9), sq=4, num_recent=1)
    args[4][2] = 0
    if sink is not None:
        kwargs["sink"] = torch.full((4,), sink, device=device_of(backend))
    out, lse, _ = run(backend, args, kwargs)
    empty = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    empty = empty.to(out.device)
    assert torch.all(out[empty] == 0) and torch.all(out[~empty] != 0)
    lse = lse.transpose(1, 2)
    assert torch.all(lse[empty] == (-INF if sink is None else sink))
    assert torch.isfinite(lse[~empty]).all()


@each_backend
@pytest.mark.parametrize("sink", [-INF, -300.0, 300.0, INF])
def test_sinks_far_above_and_below_the_scores(sink, backend):
    args, kwargs = drawn(backend, num_sink=3)
    logits = torch.full((4,), sink, device=device_of(backend))
    out, lse, mass = run(backend, args, kwargs, sink=logits)
    assert torch.isfinite(out).all() and torch.isfinite(mass).all()
    if sink > 0:
        assert torch.all(out == 0) if sink == INF else out.abs().max() < 1e-6
        assert mass.abs().max() < 1e-6
        close((lse,), (torch.full_like(lse, sink),))
    else:
        close((out, lse, mass), run(backend, args, kwargs))


@each_kernel
@each_dtype
def test_softmax_survives_scores_that_grow_along_the_keys(dtype, backend):
    n = 300
    k = torch.linspace(-300, 300, n)[None, :, None, None].repeat(1, 1, 1, 8)
    k, v = (t.to(dtype).to(device_of(backend)) for t in (k, torch.randn(1, n, 1, 8)))
    args = [torch.ones_like(k[:, :1]), k, v, *every_block(1, 1, n, 1, backend)]
    options = {"seqlens_k": ints(n, backend=backend), "scale": 1.0, "return_mass": True}
    found = run(backend, args, options)
    wide = [t.cpu().double() if t.is_floating_point() else t.cpu() for t in args]
    want = run("reference", wide, options | {"seqlens_k": ints(n)})
    for got, oracle in zip(found, want, strict=True):
        torch.testing.assert_close(
            got.cpu().double(), oracle.to(got.dtype).double(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("backend", GPU_KERNELS)
@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("block_k", [1, 8])
def test_nothing_reaches_beyond_the_cache(block_k, page_size, backend):
    """NaN around the caches reveals out-of-bounds reads; the PTX machine checks bounds itself."""
    args, kwargs = drawn(
        backend, (64, 64, 64, 64), block_k=block_k, page_size=page_size, num_sink=3, num_recent=5
    )
    args[1:3] = [c.nan_to_num(0.5) for c in args[1:3]]
    args[3][:, :, ::5] = MAX
    args[3][:, :, 1::5] = MIN
    args[4][2:] = MAX
    kwargs["seqlens_k"] = ints(MIN, MAX, 65, -1, backend=backend)
    if page_size is not None:
        kwargs["block_table"] = kwargs["block_table"].clone()
        kwargs["block_table"][:, ::2] = MAX
        kwargs["block_table"][1, 1] = MIN
        kwargs["block_table"][2, -2] = -1
    around = [torch.full((c.shape[0] + 2, *c.shape[1:]), NAN) for c in args[1:3]]
    around = [t.to(args[0].device) for t in around]
    for t, cache in zip(around, args[1:3], strict=True):
        t[1:-1] = cache
    args[1:3] = [t[1:-1] for t in around]
    for pairs in (0, 16):
        rope = {"rope": moved(rotations(64, pairs), args[0].device)} if pairs else {}
        out, _, mass = run(backend, args, kwargs | rope)
        assert torch.isfinite(out).all() and torch.isfinite(mass).all()
        assert torch.all(out[::3] == 0) and torch.all(out[1:3] != 0)


@each_kernel
def test_any_layout(backend):
    """Pages of [2, Hk, size, D], the layout of some servers, and lists inside wider ones."""
    args, kwargs = drawn(backend, (50, 20), page_size=16, extra=2, num_recent=3)
    want = run(backend, args, kwargs)
    both = torch.stack([c.transpose(1, 2) for c in args[1:3]], 1).contiguous()
    views = [both[:, i].transpose(1, 2) for i in range(2)]
    lists = [inside(t, MAX) for t in args[3:]]
    extra = {n: inside(kwargs[n], NAN) for n in kwargs if n.startswith("extra")}
    q = inside(args[0], NAN)
    assert same(run(backend, [q, *views, *lists], kwargs | extra), want)


@each_kernel
def test_the_same_inputs_give_the_same_bits(backend):
    args, kwargs = drawn(backend, (900, 64), h=6, lists=2, entries=700, capacity=900, num_recent=9)
    assert same(run(backend, args, kwargs), run(backend, args, kwargs))


@each_backend
def test_there_is_no_gradient(backend):
    args, kwargs = drawn(backend, extra=1)
    for i, name in enumerate(("q", "k_cache", "v_cache")):
        asked = [t.detach().requires_grad_(i == j) if j < 3 else t for j, t in enumerate(args)]
        with pytest.raises(RuntimeError, match=f"{name}: must not require a gradient, there is"):
            run(backend, asked, kwargs)
        with torch.no_grad():
            assert not run(backend, asked, kwargs)[0].requires_grad
