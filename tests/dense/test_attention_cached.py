"""attention over caches: each request has its own number of queries."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import backends, device_of
from each import each_backend, each_dtype_and_kernel, each_kernel, ints

import tokenmill as tm
from tokenmill import masks
from tokenmill.dense.attention_decode_cases import decode_call

INF = float("inf")


def drawn(backend, lengths, queries, dtype=torch.float32, **options):
    """A packed call on the backend's device."""
    generator = torch.Generator().manual_seed(0)
    args, kwargs = decode_call(lengths, queries=queries, **options)(dtype, generator)
    kwargs["return_lse"] = options.get("return_lse", False)
    device = device_of(backend)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return [a.to(device) for a in args], moved


@each_dtype_and_kernel
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_request_has_the_bits_that_it_has_alone(dtype, page_size, backend):
    """A full prefill, a chunk of one, decode rows and a few drafts share one call."""
    lengths, queries = (40, 90, 77, 3, 0), (40, 32, 1, 4, 2)
    args, kwargs = drawn(
        backend, lengths, queries, dtype, h=6, page_size=page_size, capacity=96, return_lse=True
    )
    out, lse = tm.attention_decode(*args, **kwargs, backend=backend)
    ends = [0, *itertools.accumulate(queries)]
    for b, rows in enumerate(slice(*pair) for pair in itertools.pairwise(ends)):
        own = kwargs | {"seqlens_k": kwargs["seqlens_k"][b : b + 1]}
        own["cu_seqlens_q"] = ints(0, queries[b], backend=backend)
        caches = [c[b : b + 1] for c in args[1:]] if page_size is None else args[1:]
        if page_size is not None:
            own["block_table"] = kwargs["block_table"][b : b + 1]
        alone, alone_lse = tm.attention_decode(args[0][rows], *caches, **own, backend=backend)
        assert torch.equal(out[rows], alone), b
        assert torch.equal(lse[:, rows], alone_lse), b


@each_backend
def test_it_is_attention_on_the_keys_of_each_request(backend):
    lengths, queries = (50, 21), (20, 21)
    args, kwargs = drawn(backend, lengths, queries, page_size=8, d=20, dv=12)
    starts, table = kwargs["cu_seqlens_q"], kwargs["block_table"]
    for options in ({"causal": True}, {"window": (7, 2)}, {"kind": "sigmoid"}):
        out = tm.attention(*args, **kwargs, **options, backend=backend)
        for b, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
            k, v = (c[table[b].clamp(0).long()].flatten(0, 1)[: lengths[b]] for c in args[1:])
            want = tm.attention(args[0][None, begin:end], k[None], v[None], **options)
            torch.testing.assert_close(out[begin:end], want[0], rtol=1e-5, atol=1e-5)


@each_kernel
def test_one_query_each_is_decode(backend):
    args, kwargs = drawn(backend, (50, 21, 64), (1, 1, 1), h=8, page_size=16)
    packed = tm.attention_decode(*args, **kwargs, backend=backend)
    kwargs.pop("cu_seqlens_q")
    rows = tm.attention_decode(args[0][:, None], *args[1:], **kwargs, backend=backend)
    torch.testing.assert_close(packed, rows[:, 0], rtol=1e-5, atol=1e-5)


@each_backend
def test_a_tree_of_drafts(backend):
    """Two branches of drafts follow 30 keys: each sees the keys, the root and its own branch."""
    args, kwargs = drawn(backend, (35,), (5,), page_size=16)
    parents = [-1, 0, 0, 1, 2]
    seen = torch.zeros(5, 5, dtype=torch.bool)
    for i in range(5):
        j = i
        while j >= 0:
            seen[i, j] = True
            j = parents[j]
    begin, end = torch.zeros(1, 1, 5, 4, dtype=torch.int32), torch.zeros(1, 1, 5, 4).int()
    end[..., 0] = 30
    for i in range(5):
        for r, j in enumerate(torch.nonzero(seen[i]).flatten().tolist()):
            begin[0, 0, i, r + 1], end[0, 0, i, r + 1] = 30 + j, 31 + j
    device = device_of(backend)
    mask = masks.ranges(begin.to(device), end.to(device))
    out = tm.attention(*args, **kwargs, causal=True, mask=mask, backend=backend)
    table = kwargs["block_table"][0].clamp(0).long()
    k, v = (c[table].flatten(0, 1)[None, :35] for c in args[1:])
    bias = torch.cat([torch.ones(5, 30, dtype=torch.bool), seen], 1).to(device)
    want = tm.attention(args[0][None], k, v, bias=bias)
    torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_no_start_length_or_page_reaches_beyond_its_tensor(backend):
    """A GPU cannot check lengths, starts and pages, so they are clamped; tokens of no request are
    empty rows."""
    args, kwargs = drawn(backend, (64, 64, 64), (20, 3, 9), page_size=16, return_lse=True)
    args[1:] = [c.nan_to_num(0.5) for c in args[1:]]
    maximum, minimum = 2**31 - 1, -(2**31)
    kwargs["seqlens_k"] = ints(maximum, minimum, 70, backend=backend)
    kwargs["block_table"] = kwargs["block_table"].clone()
    kwargs["block_table"][0, ::2] = maximum
    kwargs["block_table"][2, 1] = minimum
    kwargs["cu_seqlens_q"] = ints(2, 20, 23, 30, backend=backend)
    out, lse = tm.attention_decode(*args, **kwargs, backend=backend)
    empty = torch.ones(32, dtype=torch.bool, device=out.device)
    empty[2:20] = empty[23:30] = False
    assert torch.isfinite(out).all()
    assert torch.all(out[empty] == 0) and torch.all(out[~empty] != 0)
    assert torch.all(lse[:, empty] == -INF)
    kwargs["cu_seqlens_q"] = ints(minimum, maximum, -5, maximum, backend=backend)
    assert torch.isfinite(tm.attention_decode(*args, **kwargs, backend=backend)[0]).all()


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_a_padded_call_has_the_bits_of_the_call(backend):
    """A captured graph pads: there is room for more tokens and requests than exist."""
    args, kwargs = drawn(backend, (33, 20), (7, 1), page_size=16)
    want = tm.attention_decode(*args, **kwargs, backend=backend)
    q = torch.cat([args[0], torch.ones_like(args[0][:4])])
    kwargs["cu_seqlens_q"] = ints(0, 7, 8, 8, 8, backend=backend)
    kwargs["seqlens_k"] = ints(33, 20, 0, 0, backend=backend)
    kwargs["block_table"] = kwargs["block_table"].repeat(2, 1)
    out = torch.full_like(q, float("nan"))
    tm.attention_decode(q, *args[1:], **kwargs, out=out, backend=backend)
    assert torch.equal(out[:8], want) and torch.all(out[8:] == 0)


@each_kernel
def test_hidden_values_do_not_matter(backend):
    """NaN and inf lie after a query's position, before its window and between ranges."""
    args, kwargs = drawn(backend, (40, 33), (12, 5), page_size=8)
    for options in ({"causal": True, "window": (20, 0)}, {"window": (9, 0)}):
        want = tm.attention(*args, **kwargs, **options, backend=backend)
        caches = [c.clone() for c in args[1:]]
        page = int(kwargs["block_table"][0, 0])
        for cache in caches:  # keys 0 to 7 are before the windows of the request's last queries
            cache[page, :4] = float("nan")
            cache[page, 4:] = INF
        got = tm.attention(args[0], *caches, **kwargs, **options, backend=backend)
        rows = slice(12 - 3, None)  # queries at positions from 37 on see none of them
        torch.testing.assert_close(got[rows], want[rows], rtol=1e-6, atol=1e-6)


def test_explain_names_the_operator_of_a_cache():
    args, kwargs = drawn("cpu", (40, 9), (4, 2), page_size=16)
    explanation = tm.explain("attention", *args, **kwargs, causal=True)
    assert explanation.op == "attention_decode" and explanation.backend == "cpu"


def test_what_a_cache_refuses():
    args, kwargs = drawn("cpu", (40, 9), (4, 2), page_size=16)
    q = args[0]
    for options, message in (
        ({"bias": torch.zeros(1)}, "bias: must not be given with a cache (seqlens_k); got"),
        ({"precision": "fast"}, "precision: must not be given with a cache"),
        ({"cu_seqlens_k": kwargs["cu_seqlens_q"]}, "cu_seqlens_k: must not be given with a cache"),
        ({"max_seqlen_k": 3}, "max_seqlen_k: must not be given with a cache"),
        ({"alibi_grid": masks.grid(4)}, "alibi_grid: must not be given with a cache"),
    ):
        with pytest.raises(RuntimeError) as error:
            tm.attention(*args, **kwargs, **options)
        assert str(error.value).startswith(f"tokenmill.attention: {message}"), error.value
    with pytest.raises(RuntimeError, match=r"attention: seqlens_k: must be given with block_table"):
        tm.attention(*args, block_table=kwargs["block_table"], cu_seqlens_q=kwargs["cu_seqlens_q"])
    with pytest.raises(RuntimeError, match="gradient"):
        tm.attention(q.requires_grad_(), *args[1:], **kwargs)
