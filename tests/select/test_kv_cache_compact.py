"""kv_cache_compact: kept tokens move in order, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend, ints
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm
from tokenmill.registry import Sample

SPEC = tm.registry.get("kv_cache_compact")


def caches(b, s, hk, d, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(b, s, hk, d, generator=g).to(device, dtype) for _ in range(2))


def rotary(x, positions, base=10000.0):
    """Rotary embedding of [B, S, H, D] at positions [S], in float64."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device).double() / half)
    angle = positions.double()[:, None, None] * frequency
    a, b = x[..., :half].double(), x[..., half:].double()
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@st.composite
def calls(draw, longest):
    b, hk = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d, dv = draw(st.integers(2, 80)), draw(st.sampled_from([1, 8, 33, 64]))
    page_size = draw(st.sampled_from([None, 1, 4, 16]))
    pages = draw(st.integers(0, 6))
    capacity = draw(st.integers(0, longest)) if page_size is None else pages * page_size
    lengths = draw(st.lists(st.integers(0, capacity), min_size=b, max_size=b))
    per_head = page_size is None and draw(st.booleans())
    entries = draw(st.integers(0, longest))
    seed = draw(st.integers(0, 2**20))
    options = {
        "compensation": draw(st.booleans()),
        "interleaved": draw(st.booleans()),
        "rerotate": draw(st.sampled_from([None, None, 10000.0, 7.0])),
    }

    def make(dtype, g):
        g = torch.Generator().manual_seed(seed)
        lead = (b, capacity) if page_size is None else (b * pages + 1, page_size)
        k = torch.randn(*lead, hk, d, generator=g).to(dtype)
        v = torch.randn(*lead, hk, dv, generator=g).to(dtype)
        shape = (b, hk) if per_head else (b,)
        keep = torch.full((*shape, entries), -7, dtype=torch.int32)
        counts = torch.zeros(shape, dtype=torch.int32)
        for i in range(b):
            for h in range(hk if per_head else 1):
                at = (i, h) if per_head else (i,)
                n = int(torch.randint(min(entries, lengths[i]) + 1, (), generator=g))
                keep[(*at, slice(n))] = torch.randperm(lengths[i], generator=g)[:n].sort()[0].int()
                counts[at] = n
        given = options | {"seqlens_k": ints(*lengths)}
        if page_size is not None:
            order = torch.randperm(b * pages + 1, generator=g)[: b * pages]
            given["block_table"] = order.int().view(b, pages)
        return (k, v, keep, counts), given

    return Sample(f"{(b, capacity, hk, d, dv)} {page_size} {lengths} {per_head} {options}", make)


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@examples(25)
@given(data=st.data())
def test_any_call_keeps_the_error_budget(backend, isa, data):
    sample = data.draw(calls(40 if backend == "triton" else 120))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    found = tm.testing.compare(SPEC, sample, backend, dtype, device=device_of(backend))
    assert not [c for c in found if not c.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_backend
def test_long_lists_move_bit_by_bit(backend, dtype):
    """More tokens than a CTA holds at once, with every gap and with none."""
    k, v = caches(2, 900, 1, 64, device_of(backend), dtype)
    g = torch.Generator().manual_seed(1)
    lists = [torch.arange(1, 900), torch.randperm(900, generator=g)[:450].sort()[0]]
    keep = torch.zeros(2, 899, dtype=torch.int32)
    for row, kept in zip(keep, lists, strict=True):
        row[: len(kept)] = kept
    counts = ints(*map(len, lists))
    wanted = [(k[b, kept].clone(), v[b, kept].clone()) for b, kept in enumerate(lists)]
    tails = [(k[b, len(kept) :].clone(), v[b, len(kept) :].clone()) for b, kept in enumerate(lists)]
    now = tm.kv_cache_compact(k, v, keep.to(k.device), counts.to(k.device), backend=backend)
    assert torch.equal(now.cpu(), counts)
    for b, kept in enumerate(lists):
        assert torch.equal(k[b, : len(kept)], wanted[b][0])
        assert torch.equal(v[b, : len(kept)], wanted[b][1])
        assert torch.equal(k[b, len(kept) :], tails[b][0])
        assert torch.equal(v[b, len(kept) :], tails[b][1])


@each_backend
def test_streaming_keys_are_as_if_embedded_at_their_new_slots(backend):
    """StreamingLLM: sinks and a recent window of a long cache."""
    s, d = 20000, 32
    raw = torch.randn(1, s, 1, d, device=device_of(backend))
    slots = torch.arange(s, device=raw.device)
    k = rotary(raw, slots).float()
    keep = torch.cat([slots[:4], slots[-28:]])
    tm.kv_cache_compact(
        k, k.clone(), keep[None].int(), ints(32, backend=backend), rerotate=10000.0,
        backend=backend,
    )  # fmt: skip
    want = rotary(raw[:, keep], torch.arange(32, device=raw.device))
    torch.testing.assert_close(k[:, :32].double(), want, rtol=0, atol=3e-6)


@each_backend
def test_compensation_is_one_key_more(backend):
    """RazorAttention: the mean of the dropped keys, with log of their count added to the logit,
    stands for that many equal keys."""
    k, v = caches(1, 30, 2, 16, device_of(backend))
    k[:, 10:], v[:, 10:] = k[:, 10:11], v[:, 10:11]
    q = torch.randn(1, 1, 2, 16, device=k.device)
    full = tm.attention(q, k, v, backend="reference")
    keep = torch.arange(12, device=k.device, dtype=torch.int32)[None]
    _, k_sum, v_sum, dropped = tm.kv_cache_compact(
        k, v, keep, ints(12, backend=backend), compensation=True, backend=backend
    )
    assert dropped.tolist() == [[18, 18]]
    number = dropped[..., None].float()
    k, v = (
        torch.cat([c[:, :12], (total / number)[:, None]], 1)
        for c, total in ((k, k_sum), (v, v_sum))
    )
    bias = torch.zeros(1, 2, 1, 13, device=k.device)
    bias[..., 12] = dropped.float().log()[..., None]
    out = tm.attention(q, k, v, bias=bias, backend="reference")
    torch.testing.assert_close(out, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_entries_that_do_not_move_down_move_nothing(backend):
    k, v = caches(1, 12, 1, 8, device_of(backend))
    before = k.clone()
    keep = ints([3, 0, 2**31 - 1, -5, 9, 4, 11, 20], backend=backend)
    tm.kv_cache_compact(k, v, keep, ints(99, backend=backend), backend=backend)
    want = before.clone()
    for d, source in ((0, 3), (4, 9), (6, 11)):
        want[0, d] = before[0, source]
    assert torch.equal(k, want)


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_pages_out_of_range_are_left_alone(backend):
    k, v = caches(3, 4, 1, 8, device_of(backend))
    before = k.clone()
    table = ints([1, -1, 7, 2], backend=backend)
    keep = ints([1, 5, 9, 14], backend=backend)
    result = tm.kv_cache_compact(
        k, v, keep, ints(4, backend=backend), block_table=table, compensation=True, backend=backend
    )
    want = before.clone()
    want[1, 0], want[1, 3] = before[1, 1], before[2, 2]
    assert torch.equal(k, want)
    torch.testing.assert_close(
        result[1][0, 0], before[1, [0, 2, 3], 0].sum(0) + before[2, [0, 1, 3], 0].sum(0)
    )
