"""best_match against the definition, and rows without any product."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65]), st.integers(0, 150))


def by_definition(a, b):
    """Row by row. NaN is replaced by -inf, the minimum, so that it never wins."""
    if b.shape[1] == 0:
        none = torch.full(a.shape[:2], -torch.inf)
        return torch.full(a.shape[:2], -1, dtype=torch.int32), none
    products = (a.double() @ b.double().mT).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    score = products.amax(2)
    places = torch.arange(b.shape[1]).expand_as(products)
    index = torch.where(products == score[..., None], places, b.shape[1]).amin(2)
    return index.int(), score.float()


def views(a, b, dtype, layout):
    """a and b as two tensors, as alternating rows of one tensor, or as parts of wider rows."""
    if layout == "apart":
        return a.to(dtype), b.to(dtype)
    rows = max(a.shape[1], b.shape[1])
    wide = torch.full((a.shape[0], 2 * rows, a.shape[2] + 3), 7, dtype=dtype)
    first = 0 if layout == "alternate" else 3
    tokens = wide[:, :, first : first + a.shape[2]]
    tokens[:, : 2 * a.shape[1] : 2] = a
    tokens[:, 1 : 2 * b.shape[1] : 2] = b
    return tokens[:, : 2 * a.shape[1] : 2], tokens[:, 1 : 2 * b.shape[1] : 2]


def check(backend, a, b, want=None, **options):
    there = (t.to(device_of(backend)) for t in (a, b))
    index, score = (t.cpu() for t in tm.best_match(*there, backend=backend, **options))
    for got, wanted in zip((index, score), want or by_definition(a, b), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def whole_numbers(batch, rows, partners, channels, seed, maximum=2):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-maximum, maximum + 1, (batch, n, channels), generator=g).float()
        for n in (rows, partners)
    )


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@examples(12)
@given(
    batch=st.integers(0, 2),
    rows=SIZES,
    partners=SIZES,
    channels=st.integers(1, 70),
    layout=st.sampled_from(["apart", "alternate", "parts"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_the_definition(batch, rows, partners, channels, layout, dtype, seed, backend, isa):
    """Integers: every product is exact, and many are equal."""
    a, b = whole_numbers(batch, rows, partners, channels, seed)
    check(backend, *views(a, b, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_backend
def test_many_channels(backend, dtype):
    """More channels than a slice of a reduction, or than shared memory holds of a."""
    check(backend, *(t.to(dtype) for t in whole_numbers(1, 7, 70, 1100, 0, maximum=1)))
    check(backend, *(t.to(dtype) for t in whole_numbers(1, 2, 5, 4096, 1, maximum=1)))


@each_backend
def test_many_rows(backend):
    """More rows than a thread's work item, and enough CTAs for a GPU to use large ones."""
    check(backend, *whole_numbers(1, 901, 9, 4, 0))
    check(backend, *whole_numbers(264, 70, 3, 2, 0))


@each_backend
@examples(5)
@given(seed=st.integers(0, 2**31), channels=st.integers(1, 40))
def test_lengths_do_not_matter(seed, channels, backend):
    """Powers of two change no bit of a normalized product."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, n, channels, generator=g) for n in (21, 70))
    where = {"normalize": True, "backend": backend}
    want = tm.best_match(*(t.to(device_of(backend)) for t in (a, b)), **where)
    scaled = (t * 2.0 ** torch.randint(-9, 9, (2, t.shape[1], 1), generator=g) for t in (a, b))
    got = tm.best_match(*(t.to(device_of(backend)) for t in scaled), **where)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert got[1].abs().max() < 1.00001


@each_backend
def test_of_equal_rows_the_first(backend):
    b = torch.randn(2, 90, 24)
    # BLAS, in the reference and in Triton's interpreter, may round equal rows differently.
    if backend in ("reference", "triton"):
        b = torch.where(b.argsort(-1).argsort(-1) < 16, b.sign(), 0.0)  # norm 4
    b = b.repeat(1, 3, 1).to(device_of(backend))
    index, score = tm.best_match(b, b, normalize=True, backend=backend)
    assert torch.equal(index.cpu(), torch.arange(90, dtype=torch.int32).repeat(2, 3))
    torch.testing.assert_close(score, torch.ones_like(score))


@pytest.mark.parametrize("normalize", [False, True])
@each_backend
def test_rows_without_a_product(backend, normalize):
    a, b = torch.ones(1, 4, 20), torch.ones(1, 70, 20)
    b[0, :67] = -1
    a[0, 1, 19] = torch.nan
    b[0, 67, 3] = torch.nan
    a[0, 2] = 0
    top = 1.0 if normalize else 20.0
    index = torch.tensor([[68, 0, 0, 68]], dtype=torch.int32)
    there = (t.to(device_of(backend)) for t in (a, b))
    got, score = tm.best_match(*there, normalize=normalize, backend=backend)
    assert torch.equal(got.cpu(), index)
    want = torch.tensor([[top, -torch.inf, 0, top]])
    torch.testing.assert_close(score.cpu(), want)
    b[:] = torch.nan
    none = torch.zeros(1, 4, dtype=torch.int32), torch.full((1, 4), -torch.inf)
    check(backend, a, b, none, normalize=normalize)


@each_backend
def test_norms_that_are_not_finite_and_norms_that_are_nothing(backend):
    a = torch.tensor([[[1.0, 2], [3e19, 0], [1e-20, 1e-20], [torch.inf, 0]]])
    b = torch.tensor([[[torch.inf, 1], [1e-25, 0], [2e19, 2e19], [-1, 0], [0.6, 0.8]]])
    index = torch.tensor([[4, 0, 1, 0]], dtype=torch.int32)
    there = (t.to(device_of(backend)) for t in (a, b))
    got, score = tm.best_match(*there, normalize=True, backend=backend)
    assert torch.equal(got.cpu(), index)
    want = torch.tensor([[2.2 / 5**0.5, -torch.inf, 0, -torch.inf]])
    torch.testing.assert_close(score.cpu(), want)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "triton"])
def test_half_precision_finds_what_float32_finds(backend):
    """Products of 16-bit rows are exact, and their sums are float32."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 300, 64, generator=g)
    for dtype in (torch.float16, torch.bfloat16):
        x = tokens.to(dtype).to(device_of(backend))
        got = tm.best_match(x[:, ::2], x[:, 1::2], normalize=True, backend=backend)
        wide = x.double().cpu()
        want = tm.best_match(wide[:, ::2], wide[:, 1::2], normalize=True)
        assert (got[0].cpu() == want[0]).float().mean() > 0.99
        torch.testing.assert_close(got[1].cpu(), want[1].float(), rtol=0, atol=1e-6)


def test_inputs_with_a_gradient_are_taken_and_results_have_none():
    x = torch.randn(1, 6, 4, requires_grad=True)
    assert not any(t.requires_grad for t in tm.best_match(x[:, ::2], x[:, 1::2]))
