"""block_pool_keys: the contents of each block, and updates that equal pooling from scratch."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

INF, NAN = float("inf"), float("nan")
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def by_definition(k, block, mode, length):
    """Pools one request [S, H, D], block by block."""
    found = []
    for first in range(0, len(k), block):
        x = k[first : min(first + block, max(length, 0))]
        shape = k.shape[1:]
        if mode == "mean":
            mean = x.float().sum(0) / max(len(x), 1)
            found.append(mean.to(k.dtype))
            continue
        maximum = x.amax(0) if len(x) else torch.full(shape, -INF, dtype=k.dtype)
        minimum = x.amin(0) if len(x) else torch.full(shape, INF, dtype=k.dtype)
        found.append(maximum if mode == "max" else torch.stack((minimum, maximum), 1))
    return torch.stack(found)


@st.composite
def caches(draw):
    """Keys of small integers, whose means do not depend on order, in a cache of any layout."""
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 16, 40, 128, 200]))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(DTYPES)
    k = torch.randint(-9, 10, (batch, tokens, heads, dim), generator=generator).to(dtype)
    if draw(st.booleans()):
        k[0, draw(st.integers(0, tokens - 1)), 0, 0] = NAN
    options = {"mode": draw(st.sampled_from(["mean", "max", "minmax"]))}
    lengths = [draw(st.integers(-1, tokens + 2)) for _ in range(batch)]
    options["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    cache = k
    if draw(st.booleans()):
        page = draw(st.sampled_from([1, 4, 16]))
        pages = -(-tokens // page)
        table = torch.randperm(batch * pages + 1, generator=generator)[: batch * pages]
        table = table.int().view(batch, pages)
        cache = torch.full((batch * pages + 1, page, heads, dim), NAN, dtype=dtype)
        whole = torch.full((batch, pages * page, heads, dim), NAN, dtype=dtype)
        whole[:, :tokens] = k
        cache[table.long()] = whole.view(batch, pages, page, heads, dim)
        k = whole
        options["block_table"] = table
        options["lengths"] = torch.tensor([min(n, tokens) for n in lengths], dtype=torch.int32)
    elif draw(st.booleans()):
        cache = k.transpose(1, 2).contiguous().transpose(1, 2)
    return k, cache, draw(st.integers(1, 20)), options


def check(call, backend):
    k, cache, block, options = call
    device = device_of(backend)
    there = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    found = tm.block_pool_keys(cache.to(device), block, **there, backend=backend).cpu()
    for b, length in enumerate(options["lengths"].tolist()):
        wanted = by_definition(k[b], block, options["mode"], length)
        assert torch.equal(found[b].nan_to_num(99), wanted.nan_to_num(99))


@pytest.mark.parametrize(
    ("backend", "isa"), [(b, i) for b, i in cpu_variants() if b == "cpu"], indirect=["isa"]
)
@examples(80)
@given(call=caches())
def test_definition_on_every_instruction_set(call, backend, isa):
    check(call, backend)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "cpu"])
@examples(25)
@given(call=caches())
def test_definition(call, backend):
    check(call, backend)


@each_backend
@examples(25)
@given(
    mode=st.sampled_from(["mean", "max", "minmax"]),
    block=st.integers(1, 9),
    steps=st.lists(st.integers(0, 13), min_size=1, max_size=4),
)
def test_updates_after_each_append_equal_pooling_anew(mode, block, steps, backend):
    device = device_of(backend)
    k = torch.randn(2, sum(steps) + 3, 2, 16, device=device)
    k[0, 1, 0, 0] = NAN
    length = torch.tensor([0, 2], dtype=torch.int32, device=device)
    pooled = tm.block_pool_keys(k, block, mode=mode, lengths=length, backend=backend)
    for step in steps:
        start = length
        length = length + torch.tensor([step, step // 2], dtype=torch.int32, device=device)
        result = tm.block_pool_keys_update(
            k, pooled, block, start=start, lengths=length, mode=mode, backend=backend
        )
        assert result is pooled
        wanted = tm.block_pool_keys(k, block, mode=mode, lengths=length, backend=backend)
        assert torch.equal(pooled.nan_to_num(99), wanted.nan_to_num(99))


@each_backend
def test_an_update_touches_no_other_block(backend):
    device = device_of(backend)
    k = torch.randn(1, 64, 1, 8, device=device)
    pooled = torch.full((1, 16, 1, 8), 7.0, device=device)
    start, length = torch.tensor([[30], [41]], dtype=torch.int32, device=device)
    tm.block_pool_keys_update(k, pooled, 4, start=start, lengths=length, backend=backend)
    touched = (pooled != 7).any(3).flatten()
    assert touched.nonzero().flatten().tolist() == [7, 8, 9, 10]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_box_holds_every_key_exactly(dtype, backend):
    k = torch.randn(2, 100, 2, 64).to(dtype).to(device_of(backend))
    low, high = tm.block_pool_keys(k, 16, mode="minmax", backend=backend).unbind(3)
    low, high = (x.repeat_interleave(16, 1)[:, :100] for x in (low, high))
    assert (low <= k).all() and (k <= high).all()


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_pages_out_of_range_are_left_out(backend):
    device = device_of(backend)
    k = torch.ones(3, 4, 1, 8, device=device)
    table = torch.tensor([[0, -1, 3, 2**31 - 1, 2]], dtype=torch.int32, device=device)
    pooled = tm.block_pool_keys(k, 4, mode="max", block_table=table, backend=backend)
    assert pooled[0, :, 0, 0].tolist() == [1, -INF, -INF, -INF, 1]


def test_a_gradient_is_refused():
    k = torch.randn(1, 8, 1, 4, requires_grad=True)
    assert not tm.block_pool_keys(k, 4).requires_grad
    start = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="must not require a gradient"):
        tm.block_pool_keys_update(k, torch.zeros(1, 2, 1, 4), 4, start=start)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(9, 4, 2, 0), (9, 4, 0, 16)])
def test_pages_are_looked_at_where_nothing_is_pooled(shape, backend):
    table = torch.tensor([[0, 2**30]], dtype=torch.int32)
    rule = f"block_table: must hold pages below 9 up to the length; got {2**30}"
    with pytest.raises(RuntimeError, match=rule):
        tm.block_pool_keys(torch.zeros(shape), 4, block_table=table, backend=backend)
