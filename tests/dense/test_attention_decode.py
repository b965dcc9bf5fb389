"""Properties and regressions of attention_decode."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of, in_each_dtype
from each import DTYPES, each_backend, each_dtype, each_dtype_and_kernel, each_kernel, ints, randn
from hypothesis import given
from hypothesis import strategies as st
from strategies import HEAD_DIMS
from tier import examples

import tokenmill as tm
from tokenmill import registry
from tokenmill.dense.attention_decode_cases import decode_call
from tokenmill.registry import Sample
from tokenmill.testing import compare

SPEC = registry.get("attention_decode")
INF = float("inf")
GPU_KERNELS = [b for b in backends() if b != "cpu"]  # these do not check lengths and pages

each_kind = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def drawn(backend, lengths, dtype=torch.float32, seed=0, **options):
    """A call of decode_call on the backend's device."""
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = decode_call(lengths, **options)(dtype, generator)
    device = device_of(backend)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return [a.to(device) for a in args], moved


@st.composite
def decode_samples(draw, longest, kinds=("softmax", "softmax", "sigmoid"), normalizers=None):
    kind = draw(st.sampled_from(kinds))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (1, 7), (3, 2)]))
    heads = kv_heads * group
    page_size = draw(st.sampled_from([None, None, 1, 16, 64]))
    capacity = draw(st.integers(0, longest // (page_size or 1))) * (page_size or 1)
    length = st.one_of(st.sampled_from([0, 1, capacity]), st.integers(0, capacity))
    lengths = draw(st.lists(length.map(lambda n: min(n, capacity)), max_size=3))
    options = {
        "sq": draw(st.sampled_from([0, 1, 1, 1, 2, 5])),
        "h": heads,
        "hk": kv_heads,
        "d": draw(HEAD_DIMS),
        "dv": draw(HEAD_DIMS),
        "page_size": page_size,
        "capacity": capacity,
        "kind": kind,
        "scale": draw(st.sampled_from([None, 0.0, 0.3, -0.2, 1.5])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.5])),
        "window": (draw(st.one_of(st.just(-1), st.integers(0, longest))), 0),
        "score_bias": draw(st.sampled_from([None, -3.0, "neg_log_n"])),
        "num_splits": draw(st.sampled_from([0, 0, 1, 2, 3, 7, 20])),
    }
    if draw(st.booleans()):
        sizes = st.lists(
            st.one_of(st.sampled_from([0, 1, 4, 5]), st.integers(0, longest // 2)),
            min_size=len(lengths),
            max_size=len(lengths),
        )
        options["queries"] = draw(sizes)
    if draw(st.integers(0, 3)) == 0:
        options["causal"] = False
        options["window"] = (options["window"][0], draw(st.sampled_from([-1, 0, 3])))
    if options["num_splits"] == 0:
        options["schedule"] = draw(st.sampled_from(["auto", "split", "stream_k"]))
    if normalizers:
        # A relu row may sum to almost 0: the result is as ill-conditioned as that sum.
        options["normalize"] = draw(
            st.sampled_from(normalizers if kind != "relu" else [None, "count"])
        )
    if kind == "softmax" or options.get("normalize") == "sum":
        options["return_lse"] = True
    tensors = {
        "score_bias": draw(st.sampled_from([None, None, (heads,), (len(lengths), heads)])),
        "alibi_slopes": draw(st.sampled_from([None, None, (heads,), (len(lengths), heads)])),
        "sink": draw(st.sampled_from([None, (heads,)])) if kind == "softmax" else None,
    }

    def make(dtype, g):
        args, kwargs = decode_call(lengths, **options)(dtype, g)
        wide = torch.promote_types(dtype, torch.float32)
        for name, shape in tensors.items():
            if shape is not None:
                kwargs[name] = torch.randn(shape, generator=g).abs().to(wide)
        return args, kwargs

    return Sample(f"{lengths} {options} {tensors}", make)


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
@each_dtype
@examples(80)
@given(sample=decode_samples(longest=200))
def test_any_call_keeps_the_error_budget_on_cpu(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize("backend", GPU_KERNELS)
@each_dtype
@examples(12)
@given(sample=decode_samples(longest=150))
def test_any_call_keeps_the_error_budget(dtype, backend, sample):
    found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok], sample.name


@pytest.mark.parametrize(
    ("dtype", "backend", "isa"), in_each_dtype(DTYPES, cpu_variants()), indirect=["isa"]
)
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (12, 3), (10, 10)], ids=str)
def test_long_caches_cross_every_border(dtype, heads, backend, isa):
    """Steps, key ranges, chunks of float32 sums, groups of KV heads; rows as narrow as one
    element."""
    longest = 5000 if backend == "cpu" else 1500
    options = {"h": heads[0], "hk": heads[1], "d": 16, "dv": 16, "capacity": longest}
    for schedule in ("split", "stream_k"):
        call = decode_call((longest, 33, longest // 2 + 1), schedule=schedule, **options)
        found = compare(SPEC, Sample("long", call), backend, dtype, device=device_of(backend))
        assert not [c for c in found if not c.ok], schedule


@each_dtype_and_kernel
@pytest.mark.parametrize("dims", [(96, 128), (256, 256), (160, 40)], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (5, 4), (20, 2)], ids=str)
def test_wide_heads_with_few_and_many_rows(dtype, rows, dims, backend):
    """The split of rows, keys and columns over warps depends on all parameters."""
    group, sq = rows
    call = decode_call((100, 37), sq=sq, h=group, hk=1, d=dims[0], dv=dims[1], capacity=100)
    found = compare(SPEC, Sample("wide", call), backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok]


@each_dtype_and_kernel
@each_kind
def test_any_number_of_splits_keeps_the_error_budget(dtype, kind, backend):
    shape = {"sq": 2, "capacity": 300, "kind": kind, "score_bias": "neg_log_n"}
    schedules = [{"num_splits": n} for n in (1, 2, 3, 10, 40)]
    schedules += [{"schedule": name} for name in ("split", "stream_k")]
    for schedule in schedules:
        sample = Sample("splits", decode_call((300, 7, 129), **shape, **schedule))
        found = compare(SPEC, sample, backend, dtype, device=device_of(backend))
        assert not [c for c in found if not c.ok], schedule


@each_kernel
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("splits", [1, 3])
def test_fixed_splits_make_a_request_independent_of_its_batch(splits, page_size, backend):
    args, kwargs = drawn(
        backend, (200, 31, 256, 0), capacity=256, page_size=page_size, num_splits=splits
    )
    together = tm.attention_decode(*args, **kwargs, backend=backend)
    for b in range(4):
        own = {"seqlens_k": kwargs["seqlens_k"][b : b + 1], "num_splits": splits}
        cut = slice(b, b + 1) if page_size is None else slice(None)
        if page_size is not None:
            own["block_table"] = kwargs["block_table"][b : b + 1]
        alone = tm.attention_decode(
            args[0][b : b + 1],
            *(c[cut] for c in args[1:]),
            **own,
            return_lse=True,
            backend=backend,
        )
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[b : b + 1], part)


@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
def test_automatic_ranges_on_the_cpu_depend_on_the_request_alone(backend, threads):
    args, kwargs = drawn(backend, (3000, 100), capacity=3000)
    threads(2)
    together = tm.attention_decode(*args, **kwargs, backend=backend)
    threads(1)
    kwargs["seqlens_k"] = kwargs["seqlens_k"][:1]
    alone = tm.attention_decode(*(a[:1] for a in args), **kwargs, backend=backend)
    for whole, part in zip(together, alone, strict=True):
        assert torch.equal(whole[:1], part)


@each_backend
@each_kind
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("window", [(-1, -1), (5, 0)], ids=str)
def test_steps_of_decoding_are_the_prefill(window, step, kind, backend):
    tokens, batch = 12, 2
    q = randn(batch, tokens, 4, 16, backend=backend)
    k, v = (randn(batch, tokens, 2, 16, backend=backend) for _ in range(2))
    options = {"kind": kind, "window": window}
    want = tm.attention(q, k, v, causal=True, backend="reference", **options)
    caches = [torch.full_like(t, float("nan")) for t in (k, v)]
    for t in range(0, tokens, step):
        for cache, new in zip(caches, (k, v), strict=True):
            cache[:, t : t + step] = new[:, t : t + step]
        out = tm.attention_decode(
            q[:, t : t + step],
            *caches,
            seqlens_k=ints(*[t + step] * batch, backend=backend),
            backend=backend,
            **options,
        )
        close(out, want[:, t : t + step])


@each_kernel
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_pages_hold_the_same_as_a_dense_cache(page_size, backend):
    lengths = (130, 64, 1)
    dense, kwargs = drawn(backend, lengths, capacity=192)
    paged, table = drawn(backend, lengths, capacity=192, page_size=page_size)
    for a, b in zip(
        tm.attention_decode(*dense, **kwargs, backend=backend),
        tm.attention_decode(*paged, **table, backend=backend),
        strict=True,
    ):
        assert torch.equal(a, b)


@each_backend
def test_any_layout_of_the_cache(backend):
    """Pages of [2, Hk, size, D], the layout of some servers, are views of the layout here."""
    args, kwargs = drawn(backend, (50, 20), page_size=16)
    want = tm.attention_decode(*args, **kwargs, backend=backend)
    both = torch.stack([c.transpose(1, 2) for c in args[1:]], 1).contiguous()
    views = (both[:, i].transpose(1, 2) for i in range(2))
    got = tm.attention_decode(args[0], *views, **kwargs, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@each_backend
@pytest.mark.parametrize("sink", [None, 1.5])
@pytest.mark.parametrize("schedule", ["split", "stream_k"])
def test_a_query_without_keys_is_zero(schedule, sink, backend):
    """Covers requests without a key, and tokens before the first key of a request."""
    args, kwargs = drawn(backend, (0, 2, 9), sq=4)
    if sink is not None:
        kwargs["sink"] = torch.full((4,), sink, device=device_of(backend))
    out, lse = tm.attention_decode(*args, **kwargs, schedule=schedule, backend=backend)
    empty = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    empty = empty.to(out.device)
    assert torch.all(out[empty] == 0) and torch.all(out[~empty] != 0)
    lse = lse.transpose(1, 2)
    assert torch.all(lse[empty] == (-INF if sink is None else sink))
    assert torch.isfinite(lse[~empty]).all()


@each_backend
@each_kind
@pytest.mark.parametrize("schedule", ["split", "stream_k"])
def test_nan_stays_in_its_request(schedule, kind, backend):
    args, kwargs = drawn(backend, (40, 40, 40), kind=kind, page_size=16, capacity=48)
    want = tm.attention_decode(*args, **kwargs, schedule=schedule, backend=backend)
    page = int(kwargs["block_table"][1, 0])
    for cache in args[1:]:
        cache[page, 3] = float("nan")
    got = tm.attention_decode(*args, **kwargs, schedule=schedule, backend=backend)
    others = [0, 2]
    assert torch.isnan(outputs(got)[0][1]).all()
    for a, b in zip(outputs(got), outputs(want), strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("backend", GPU_KERNELS)
@each_kind
@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("schedule", ["split", "stream_k"])
def test_no_length_and_no_page_reaches_beyond_the_cache(schedule, page_size, kind, backend):
    """NaN around the caches reveals out-of-bounds reads; the PTX machine checks bounds itself."""
    minimum, maximum = -(2**31), 2**31 - 1
    args, kwargs = drawn(backend, (64, 64, 64, 64), kind=kind, page_size=page_size)
    args[1:] = [c.nan_to_num(0.5) for c in args[1:]]
    kwargs["seqlens_k"] = ints(minimum, maximum, 65, -1, backend=backend)
    if page_size is not None:
        kwargs["block_table"] = kwargs["block_table"].clone()
        kwargs["block_table"][:, ::2] = maximum
        kwargs["block_table"][1, 1] = minimum
        kwargs["block_table"][2, -1] = -1
    around = [torch.full((c.shape[0] + 2, *c.shape[1:]), torch.nan) for c in args[1:]]
    around = [t.to(args[0].device) for t in around]
    for t, cache in zip(around, args[1:], strict=True):
        t[1:-1] = cache
    out = outputs(
        tm.attention_decode(
            args[0], *(t[1:-1] for t in around), **kwargs, schedule=schedule, backend=backend
        )
    )[0]
    assert torch.isfinite(out).all()
    assert torch.all(out[::3] == 0) and torch.all(out[1:3] != 0)


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@pytest.mark.parametrize("n", [256, 4096, 65536])
@pytest.mark.parametrize("splits", [0, 1])
@each_dtype
def test_sums_of_small_weights_are_relatively_accurate(dtype, splits, n, backend, isa):
    q, k = randn(1, 1, 2, 16, dtype=dtype, backend=backend), torch.zeros(1, n, 1, 16)
    k[:, ::2] = torch.randn(k[:, ::2].shape)
    k = k.to(q)
    options = {"kind": "sigmoid", "score_bias": "neg_log_n", "num_splits": splits}
    ones = torch.ones_like(k)
    out = tm.attention_decode(
        q, k, ones, seqlens_k=ints(n, backend=backend), backend=backend, **options
    )
    wide = tm.attention_decode(
        q.double(), k.double(), ones.double(), seqlens_k=ints(n, backend=backend), **options
    )
    limit = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert ((out.double() - wide) / wide).abs().max() < limit


@each_kernel
@each_dtype
def test_softmax_survives_scores_that_grow_along_the_keys(dtype, backend):
    n = 300
    k = torch.linspace(-300, 300, n)[None, :, None, None].repeat(1, 1, 1, 8)
    k, v = (t.to(dtype).to(device_of(backend)) for t in (k, torch.randn(1, n, 1, 8)))
    q = torch.ones_like(k[:, :1])
    found = tm.attention_decode(
        q, k, v, seqlens_k=ints(n, backend=backend), scale=1.0, return_lse=True, backend=backend
    )
    want = tm.attention_decode(
        *(t.cpu().double() for t in (q, k, v)), seqlens_k=ints(n), scale=1.0, return_lse=True
    )
    for got, oracle in zip(found, want, strict=True):
        close(got.cpu().double(), oracle.to(got.dtype).double())


@each_backend
@pytest.mark.parametrize("sink", [-INF, -300.0, 300.0, INF])
def test_sinks_far_above_and_below_the_scores(sink, backend):
    args, kwargs = drawn(backend, (20, 64))
    kwargs["sink"] = torch.full((4,), sink, device=device_of(backend))
    out, lse = tm.attention_decode(*args, **kwargs, backend=backend)
    assert torch.isfinite(out).all()
    if sink > 0:
        assert torch.all(out == 0) if sink == INF else out.abs().max() < 1e-6
        close(lse, torch.full_like(lse, sink))
    else:
        del kwargs["sink"]
        for got, want in zip(
            (out, lse), tm.attention_decode(*args, **kwargs, backend=backend), strict=True
        ):
            close(got, want)


@each_backend
def test_there_is_no_gradient(backend):
    args, kwargs = drawn(backend, (20, 64))
    for i, name in enumerate(("q", "k_cache", "v_cache")):
        asked = [t.detach().requires_grad_(i == j) for j, t in enumerate(args)]
        with pytest.raises(RuntimeError, match=f"{name}: must not require a gradient, there is"):
            tm.attention_decode(*asked, **kwargs, backend=backend)
        with torch.no_grad():
            out, _ = tm.attention_decode(*asked, **kwargs, backend=backend)
        assert not out.requires_grad


@each_kernel
def test_empty_dimensions(backend):
    for lengths, options in (((), {}), ((3,), {"sq": 0}), ((0, 0), {"capacity": 0})):
        args, kwargs = drawn(backend, lengths, **options)
        out, lse = tm.attention_decode(*args, **kwargs, backend=backend)
        assert out.shape == args[0].shape and lse.numel() == out.shape[0] * out.shape[1] * 4
        assert torch.all(out == 0) and torch.all(lse == -INF)


@each_backend
def test_a_scalar_in_place_of_queries_breaks_a_rule(backend):
    """Also where a backend first says whether it supports the call."""
    k = torch.zeros(1, 4, 1, 8, device=device_of(backend))
    lengths = torch.tensor([4], dtype=torch.int32, device=k.device)
    for causal in (True, False):
        with pytest.raises(RuntimeError, match=r"tokenmill\.attention_decode: q: must have 4 dim"):
            tm.attention_decode(
                k[0, 0, 0, 0], k, k, seqlens_k=lengths, causal=causal, backend=backend
            )
