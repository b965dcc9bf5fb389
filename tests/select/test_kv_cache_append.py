"""kv_cache_append: written rows have the same bits on every backend, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from test_contract import equal, map_tensors
from tier import examples

import tokenmill as tm

FLOAT8 = torch.float8_e4m3fn
# Subnormal in float32 only: Triton's interpreter misreads subnormal bfloat16.
TINY = (1e-45, -1e-41)
HOSTILE = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), *TINY, 6e-36, 3e38, 448.0)


def float8(x):
    return x.to(FLOAT8)


def rotation(positions, pairs, base=100.0):
    """cos and sin tables [positions, pairs]."""
    frequency = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = torch.arange(positions)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


@st.composite
def calls(draw):
    """Arguments of a call, drawn again from one seed each time the returned function is called."""
    pages, page_size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = st.one_of(st.integers(1, 48), st.sampled_from([64, 128, 200, 256]))
    d, dv = draw(sizes), draw(sizes)
    if draw(st.integers(0, 3)) == 0:  # one row holds both
        d, dv = draw(st.sampled_from([d, 300, 401, 576])), None
    tokens = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    narrow, interleaved = draw(st.integers(0, 3)) > 0, draw(st.booleans())
    offset = draw(st.one_of(st.just(0), st.sampled_from([1, 3, 8, d // 2, d - 2])))
    offset = min(max(offset, 0), max(d - 2, 0))
    pairs = st.one_of(st.integers(1, (d - offset) // 2), st.just(max((d - offset) // 16 * 8, 1)))
    pairs = draw(st.one_of(st.none(), pairs)) if d > 1 else None
    with_q = pairs is not None and draw(st.booleans())
    scales = [draw(st.sampled_from(["token", "one", "head", None])) for _ in range(2)]
    hostile = draw(st.booleans())
    apart = draw(st.integers(0, 2))  # gap between rows in elements
    seed = draw(st.integers(0, 2**20))

    def make():
        g = torch.Generator().manual_seed(seed)

        def rows(*shape):
            x = torch.randn(*shape[:-1], shape[-1] + apart, generator=g)[..., : shape[-1]]
            if hostile:
                values = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), x.shape, generator=g)]
                x = x.copy_(torch.where(torch.rand(x.shape, generator=g) < 0.3, values, x))
            return x.to(dtype)

        widths = [n for n in (d, dv) if n is not None]
        caches = [torch.randn(pages, page_size, hk, n, generator=g) for n in widths]
        caches = [float8(c) if narrow else c.to(dtype) for c in caches]
        new = [rows(tokens, hk, n) for n in widths]
        if dv is None:
            caches, new = [*caches, None], [*new, None]
        slots = torch.randperm(pages * page_size, generator=g)[:tokens]
        slots = torch.cat([slots, slots.new_full((tokens - len(slots),), -1)])
        args = (*caches, *new, slots.to(kind))
        options = {"interleaved": interleaved}
        if pairs is not None:
            at = torch.randint(7, (tokens,), generator=g).to(kind)
            options.update(rope=(*rotation(7, pairs), at), rope_offset=offset)
        if with_q:
            options["q"] = rows(tokens, hk * group, d)
        for name, shape in zip(("k_scale", "v_scale"), scales, strict=True):
            if narrow and shape is not None and (dv or name == "k_scale"):
                size = {"one": (1,), "head": (hk,), "token": (pages, page_size, hk)}[shape]
                options[name] = torch.rand(size, generator=g) + 1e-3
        return args, options

    return make


def appended(make, backend):
    """Returned and written tensors."""
    args, options = map_tensors(make(), lambda t: t.to(device_of(backend)))
    turned = tm.kv_cache_append(*args, backend=backend, **options)
    found = [turned, *args[:2], options.get("k_scale"), options.get("v_scale")]
    return [t.cpu() for t in found if t is not None]


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@examples(100)
@given(make=calls())
def test_every_backend_writes_the_bits_of_the_reference(backend, isa, make):
    for found, want in zip(appended(make, backend), appended(make, "reference"), strict=True):
        assert found.dtype == want.dtype and equal(found, want)


@pytest.mark.parametrize(
    ("pages", "heads", "queries", "tokens"), [(0, 2, 2, 3), (2, 0, 0, 2), (2, 2, 0, 0)], ids=str
)
@each_backend
def test_there_may_be_nothing(backend, pages, heads, queries, tokens):
    device = device_of(backend)
    k = torch.ones(tokens, heads, 8, device=device)
    caches = torch.ones(2, pages, 3, heads, 8, device=device)
    slots = torch.full((tokens,), -1, device=device)
    rope = (*(t.to(device) for t in rotation(1, 4)), slots + 1)
    q = torch.ones(tokens, queries, 8, device=device)
    turned = tm.kv_cache_append(*caches, k, k, slots, q=q, rope=rope, backend=backend)
    assert turned.shape == q.shape and bool((turned == 1).all()) and bool((caches == 1).all())


@each_backend
def test_scales_of_tokens_come_from_finite_numbers(backend):
    """A row of zeros or without a finite number has scale 1; infinities saturate, NaN stays."""
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor(
        [[0.0, -0.0, 0.0], [inf, -inf, nan], [7.0, -inf, nan], [1e-37, -1e-38, 0], [-3.5, 1, 0.125]]
    )
    want = torch.tensor([1, 1, 7 / 448, 1, 3.5 / 448])
    codes = [[0, 0x80, 0], [0x7E, 0xFE, 0x7F], [0x7E, 0xFE, 0x7F], [0, 0x80, 0], [0xFE, 0x70, 0x58]]
    k = rows[:, None].to(device_of(backend))
    cache = float8(torch.zeros(2, 1, 5, 1, 3)).to(k.device)
    scales = torch.zeros(2, 1, 5, 1, device=k.device)
    slots = torch.arange(5, device=k.device)
    assert (
        tm.kv_cache_append(*cache, k, k, slots, k_scale=scales[0], v_scale=scales[1],
                           backend=backend)
        is None
    )  # fmt: skip
    for held, scale in zip(cache, scales, strict=True):
        assert torch.equal(scale[0, :, 0].cpu(), want)
        assert held.view(torch.uint8)[0, :, 0].tolist() == codes


@pytest.mark.parametrize("scales", ["token", "one", None])
def test_what_is_read_back_is_near(scales):
    g = torch.Generator().manual_seed(0)
    k = torch.randn(30, 2, 64, generator=g) * 50
    cache = float8(torch.zeros(2, 5, 8, 2, 64))
    scale = {"token": torch.zeros(5, 8, 2), "one": torch.tensor([0.5]), None: None}[scales]
    given = torch.randperm(40, generator=g)[:30]
    v_scale = scale.clone() if scales == "token" else scale  # one tensor may be read twice
    tm.kv_cache_append(*cache, k, k, given, k_scale=scale, v_scale=v_scale)
    unit = scale.view(40, 2, 1)[given] if scales == "token" else 1.0 if scale is None else scale
    for held in cache:
        found = held.view(torch.uint8).view(40, 2, 64)[given].view(FLOAT8).float() * unit
        assert ((found - k).abs() <= k.abs() / 16 + unit * 2**-10).all()


@pytest.mark.parametrize("interleaved", [False, True])
@each_backend
def test_rows_turn_as_complex_numbers(backend, interleaved):
    """Products of a rotated query and key depend only on the distance of their positions."""
    device = device_of(backend)
    cos, sin = rotation(20, 8)
    x = torch.randn(20, 1, 20, generator=torch.Generator().manual_seed(0))
    caches = torch.zeros(2, 1, 20, 1, 20, device=device)
    at = torch.arange(20)
    turned = tm.kv_cache_append(
        *caches, x.to(device), x.to(device), at.to(device), q=x.to(device),
        rope=tuple(t.to(device) for t in (cos, sin, at)), interleaved=interleaved, backend=backend,
    )  # fmt: skip
    wide = x[..., :16].double()
    pairs = wide.unflatten(-1, (8, 2)) if interleaved else wide.unflatten(-1, (2, 8)).mT
    want = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[:, None]
    want = torch.view_as_real(want)
    want = want.flatten(-2) if interleaved else want.mT.flatten(-2)
    for found in (turned, caches[0, 0]):
        torch.testing.assert_close(found[..., :16].cpu().double(), want, rtol=0, atol=1e-6)
        assert torch.equal(found[..., 16:].cpu(), x[..., 16:])
    assert torch.equal(caches[1, 0].cpu(), x)


@each_backend
def test_a_request_that_grows_in_pages_is_one_that_was_there(backend):
    """Keys and values in pages of one tensor, filled in three calls, and read by decode."""
    device, dtype = device_of(backend), torch.float32
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(11, h, 16, generator=g).to(device, dtype) for h in (4, 2, 2))
    pages = torch.zeros(4, 2, 4, 2, 16, dtype=dtype, device=device)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32, device=device)
    at = torch.arange(11, device=device)
    slots = table[0, at // 4].long() * 4 + at % 4
    rope = (*(t.to(device) for t in rotation(11, 8)), at)
    turned = [
        tm.kv_cache_append(
            pages[:, 0], pages[:, 1], k[part], v[part], slots[part], q=q[part],
            rope=(*rope[:2], at[part]), backend=backend,
        )
        for part in (slice(0, 6), slice(6, 10), slice(10, 11))
    ]  # fmt: skip
    whole = torch.zeros(2, 1, 11, 2, 16, device=device)
    queries = tm.kv_cache_append(*whole, k, v, at, q=q, rope=rope, backend="reference")
    assert torch.equal(torch.cat(turned), queries)
    want = tm.attention(queries[None, -1:], *whole, backend="reference")
    found, _ = tm.attention_decode(
        turned[-1][None], pages[:, 0], pages[:, 1], block_table=table, return_lse=True,
        seqlens_k=torch.tensor([11], dtype=torch.int32, device=device), backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("interleaved", [False, True])
@each_backend
def test_a_latent_row_is_its_parts(backend, interleaved):
    """Columns from rope_offset on are rotated like a key, the latent columns before them are copied
    like a value."""
    g, device = torch.Generator().manual_seed(0), device_of(backend)
    rows, q = (torch.randn(3, h, 40, generator=g).to(device) for h in (1, 2))
    whole, apart = torch.zeros(2, 2, 4, 1, 40, device=device)
    at = torch.arange(3, device=device)
    rope = (*(t.to(device) for t in rotation(3, 6)), at)
    how = {"rope": rope, "interleaved": interleaved, "backend": backend}
    turned = tm.kv_cache_append(whole, None, rows, None, at + 2, q=q, rope_offset=24, **how)
    parts = [t[..., part] for part in (slice(24, 40), slice(24)) for t in (apart, rows)]
    beside = tm.kv_cache_append(*parts[::2], *parts[1::2], at + 2, q=q[..., 24:], **how)
    assert torch.equal(whole, apart) and whole.count_nonzero() == rows.numel()
    assert torch.equal(turned, torch.cat([q[..., :24], beside], -1))


def test_a_latent_row_in_float8_has_one_scale():
    """The row is read as key and as value."""
    g = torch.Generator().manual_seed(0)
    rows, q = (torch.randn(5, h, 40, generator=g) for h in (1, 2))
    cache, scale = float8(torch.zeros(2, 4, 1, 40)), torch.zeros(2, 4, 1)
    tm.kv_cache_append(cache, None, rows, None, torch.arange(5), k_scale=scale)
    how = {"seqlens_k": torch.tensor([5]).int(), "block_table": torch.tensor([[0, 1]]).int()}
    scales = {"k_scale": scale, "v_scale": scale}
    out = tm.attention_decode(q[None, -1:], cache, cache[..., :24], **how, **scales)
    want = tm.attention(q[None, -1:], rows[None], rows[None, ..., :24])
    torch.testing.assert_close(out, want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_bad_slots_are_left_out_and_bad_positions_cut(backend):
    device = device_of(backend)
    k = torch.arange(6.0, device=device)[:, None, None].expand(6, 1, 4) + 1
    caches = torch.zeros(2, 3, 2, 1, 4, device=device)
    slots = torch.tensor([4, -7, 6, 2**40, -(2**63), 1], device=device)
    at = torch.tensor([-5, 0, 0, 0, 0, 2**40], device=device)
    cos = torch.tensor([[2.0, 2.0], [3.0, 3.0]], device=device)
    sin = torch.zeros_like(cos)
    turned = tm.kv_cache_append(*caches, k, k, slots, q=k, rope=(cos, sin, at), backend=backend)
    assert turned[:, 0, 0].tolist() == [2, 4, 6, 8, 10, 18]
    for held, first, last in ((caches[0], 2, 18), (caches[1], 1, 6)):
        want = torch.zeros(6)
        want[4], want[1] = first, last
        assert torch.equal(held[..., 0].flatten().cpu(), want)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b in ("cpu", "reference")])
def test_an_error_writes_nothing(backend):
    k = torch.ones(3, 1, 4)
    cache, scale = float8(torch.zeros(2, 2, 2, 1, 4)), torch.zeros(2, 2, 1)
    for slots in ([0, 1, 4], [0, 3, 0]):
        with pytest.raises(RuntimeError, match="kv_cache_append: slots"):
            tm.kv_cache_append(*cache, k, k, torch.tensor(slots), k_scale=scale, backend=backend)
    assert not cache.view(torch.uint8).any() and not scale.any()


def test_slots_of_64_bits():
    """A cache of more than 2^31 slots, of which two are touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    bytes_ = [torch.empty(2**29 + 1, 4, 1, 1, dtype=torch.uint8) for _ in range(2)]
    k = torch.tensor([2.0, 3.0])[:, None, None]
    slots = torch.tensor([2**31 + 3, 5])
    tm.kv_cache_append(*(t.view(FLOAT8) for t in bytes_), k, k, slots, backend="cpu")
    for held in bytes_:
        assert held[[2**29, 1], [3, 1], 0, 0].tolist() == [0x40, 0x44]


def test_float64_goes_to_the_reference_beside_float8_too():
    k = torch.ones(1, 1, 4, dtype=torch.float64)
    cache = float8(torch.zeros(2, 1, 2, 1, 4))
    slot = torch.tensor([1])
    assert tm.explain("kv_cache_append", *cache, k, k, slot).backend == "reference"
    tm.kv_cache_append(*cache, k, k, slot)
    assert cache.view(torch.uint8)[:, 0, 1].eq(0x38).all()
