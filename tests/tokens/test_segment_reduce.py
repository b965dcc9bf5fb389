"""Properties of segment_reduce."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from each import each_backend, each_kernel, ints
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm
from tokenmill.tokens.segment_reduce_cases import draw_offsets

REDUCES = ("sum", "mean", "amax", "amin", "first", "last")
NAN, INF = float("nan"), float("inf")


def reduced(x, offsets, backend, **options):
    """Runs on the device of the backend and returns the result on the CPU."""
    device = device_of(backend)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    result = tm.segment_reduce(x.to(device), offsets.to(device), backend=backend, **moved)
    return result.cpu() if isinstance(result, torch.Tensor) else [r.cpu() for r in result]


def by_hand(x, offsets, perm, weight, reduce):
    """Reduces row by row in float64."""
    batch, _, channels = x.shape
    y = x.new_zeros(batch, offsets.shape[1] - 1, channels, dtype=torch.float64)
    sizes = y.new_zeros(y.shape[:2])
    for b in range(batch):
        places = torch.arange(x.shape[1]) if perm is None else perm[b]
        for s in range(y.shape[1]):
            rows = places[offsets[b, s] : offsets[b, s + 1]]
            rows = rows[rows >= 0]
            some = x[b, rows].double()
            w = torch.ones(len(rows)) if weight is None else weight[b, rows]
            sizes[b, s] = w.sum()
            if len(rows) == 0:
                continue
            if reduce in ("sum", "mean"):
                y[b, s] = (w[:, None] * some).sum(0)
                if reduce == "mean":
                    y[b, s] = y[b, s] / sizes[b, s] if sizes[b, s] else 0
            elif reduce in ("amax", "amin"):
                y[b, s] = some.amax(0) if reduce == "amax" else some.amin(0)
            else:
                y[b, s] = some[0 if reduce == "first" else -1]
    return y, sizes


@st.composite
def calls(draw, reduces=REDUCES):
    """Draws integers, whose sums are exact in any order."""
    batch, tokens = draw(st.integers(0, 3)), draw(st.integers(0, 40))
    channels = draw(st.sampled_from([0, 1, 3, 8, 16, 31, 64, 70]))
    segments = draw(st.integers(0, 9))
    reduce = draw(st.sampled_from(reduces))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randint(-9, 10, (batch, tokens, channels), generator=g).float()
    x = x.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    perm = weight = None
    places = tokens
    if draw(st.booleans()):
        places = draw(st.integers(0, tokens + 5))
        perm = torch.rand(batch, tokens + 5, generator=g).argsort(-1)[:, :places].int()
        perm = torch.where(perm < tokens, perm, -1)
    if reduce in ("sum", "mean") and draw(st.booleans()):
        weight = torch.randint(0, 3, (batch, tokens), generator=g).float()
    return x, draw_offsets(batch, segments, places, g), perm, weight, reduce


@each_backend
@examples(30)
@given(call=calls())
def test_segments_hold_what_they_should(backend, call):
    x, offsets, perm, weight, reduce = call
    y, sizes = reduced(
        x, offsets, backend, perm=perm, weight=weight, reduce=reduce, return_weight_sum=True
    )
    want, want_sizes = by_hand(*call)
    assert y.dtype == x.dtype and sizes.dtype == torch.float32
    assert torch.equal(sizes, want_sizes.float())
    exact = want.to(x.dtype) if reduce != "mean" else want.float().to(x.dtype)
    torch.testing.assert_close(y, exact, rtol=0 if reduce != "mean" else 2**-7, atol=0)


@each_backend
@examples(15)
@given(call=calls(reduces=("sum", "amax", "amin", "first", "last")))
def test_the_gradient_is_the_adjoint(backend, call):
    """Integers: every gradient is exact."""
    x, offsets, perm, weight, reduce = call

    def run(name):
        leaves = [x.float().requires_grad_()]
        leaves += [] if weight is None else [weight.clone().requires_grad_()]
        w = leaves[1] if weight is not None else None
        y, sizes = reduced(
            leaves[0], offsets, name, perm=perm, weight=w, reduce=reduce, return_weight_sum=True
        )
        g = torch.Generator().manual_seed(3)
        loss = (y * torch.randint(-3, 4, y.shape, generator=g)).sum()
        return torch.autograd.grad(loss + (3 * sizes).sum(), leaves)

    for got, want in zip(run(backend), run("reference"), strict=True):
        assert torch.equal(got, want)


@each_backend
def test_nan_wins_and_the_first_of_equals_takes_the_gradient(backend):
    x = torch.tensor(
        [[1.0, NAN, -0.0, -INF], [3.0, 9.0, 0.0, -INF], [3.0, NAN, 0.0, -INF], [2.0, 5.0, -0.0, 7]]
    ).requires_grad_()
    for reduce, rows in (("amax", (1, 0, 0, 3)), ("amin", (0, 0, 0, 0))):
        y = reduced(x, ints(0, 0, 4), backend, reduce=reduce)
        assert torch.equal(y[0], torch.zeros(4))
        want = torch.stack([x[r, c] for c, r in enumerate(rows)])
        assert torch.equal(y[1].isnan(), want.isnan())
        assert torch.equal(y[1].nan_to_num(), want.nan_to_num())
        assert torch.equal(y[1].signbit()[2:], want.signbit()[2:])
        (dx,) = torch.autograd.grad(y[1, ~want.isnan()].sum() + y[0].sum() + y[1, 1], x)
        want_dx = torch.zeros(4, 4)
        for c, r in enumerate(rows):
            want_dx[r, c] = 1
        assert torch.equal(dx, want_dx)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_ends_keep_their_bits(backend, dtype):
    """This includes a signaling NaN."""
    as_int = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    quiet = torch.full((3, 9), NAN, dtype=dtype).view(as_int)
    x = (quiet ^ (1 << (5 if dtype.itemsize == 2 else 20))).view(dtype)
    for reduce, row in (("first", 0), ("last", 2)):
        y = reduced(x, ints(0, 3), backend, reduce=reduce)
        assert torch.equal(y[0].view(as_int), x[row].view(as_int))


@each_backend
def test_no_weight_gives_nothing_and_no_gradient(backend):
    """The weights of a segment sum to 0, for any contents of the rows."""
    x = torch.tensor([[[1.0], [INF], [4.0], [NAN]]]).requires_grad_()
    weight = torch.tensor([[2.0, 0.0, -2.0, 0.0]]).requires_grad_()
    y, size = reduced(
        x, ints(0, 4)[None], backend, weight=weight, reduce="mean", return_weight_sum=True
    )
    assert y.tolist() == [[[0.0]]] and size.tolist() == [[0.0]]
    dx, dweight = torch.autograd.grad(y.sum() + 5 * size.sum(), (x, weight))
    assert not dx.any()
    assert dweight.tolist() == [[5.0] * 4]


@each_backend
@pytest.mark.parametrize(
    "ends",
    [(3, 2590, 2600), (0, 2600), (*range(60), 2550, 2600)],
    ids=["two", "one", "among short ones"],
)
@pytest.mark.parametrize("reduce", REDUCES)
def test_long_segments(backend, reduce, ends):
    """They are split into parts. The extreme rows of two parts are equal."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2600, 5, generator=g)
    x[1300], x[2500] = 9.0, 9.0
    x[1301], x[2501] = -9.0, -9.0
    x.requires_grad_()
    y, sizes = reduced(x, ints(*ends), backend, reduce=reduce, return_weight_sum=True)
    wide = x.detach().double().requires_grad_()
    want = reduced(wide, ints(*ends), "reference", reduce=reduce)
    torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(sizes, ints(*ends).diff().float())
    (dx,) = torch.autograd.grad(y.sum(), x)
    (want_dx,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(dx, want_dx.float())


@pytest.mark.parametrize("reduce", REDUCES)
def test_parts_of_long_segments_do_not_depend_on_threads(reduce, threads):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5000, 40, generator=g)
    perm = torch.rand(2, 5000, generator=g).argsort(-1).int()
    offsets = torch.stack([ints(0, 4000, 4100, 5000), ints(9, 9, 1034, 4999)])
    found = []
    for count in (1, 2, 5):
        threads(count)
        leaf = x.clone().requires_grad_()
        y = tm.segment_reduce(leaf, offsets, perm=perm, reduce=reduce, backend="cpu")
        found.append((y, *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for y, dx in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(dx, found[0][1])


@each_kernel
def test_sums_of_many_small_rows_stay_accurate(backend):
    x = torch.full((1, 40000, 1), 0.1)
    y = reduced(x, ints(0, 40000)[None], backend)
    assert abs(y.item() / 4000 - 1) < 2e-6


@each_backend
def test_packed_is_a_batch_of_one(backend):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 8, generator=g), torch.rand(20, generator=g)
    perm = torch.randperm(20, generator=g).int()
    offsets = ints(2, 9, 9, 20)
    one = reduced(
        x, offsets, backend, perm=perm, weight=weight, reduce="mean", return_weight_sum=True
    )
    batch = reduced(
        x[None], offsets[None], backend, perm=perm[None], weight=weight[None], reduce="mean",
        return_weight_sum=True,
    )  # fmt: skip
    assert all(torch.equal(a, b[0]) for a, b in zip(one, batch, strict=True))


@each_backend
def test_weights_of_any_floating_type(backend):
    x, offsets = torch.ones(4, 2), ints(0, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=dtype, requires_grad=True)
        y = reduced(x, offsets, backend, weight=weight)
        assert y.tolist() == [[7.5, 7.5]]
        (dweight,) = torch.autograd.grad(y.sum(), weight)
        assert dweight.dtype == dtype and dweight.tolist() == [2.0] * 4


@each_kernel
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_gradient_of_the_rows_does_not_depend_on_whether_weights_want_one(backend, reduce):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 30, 40, generator=g), torch.rand(1, 30, generator=g)
    found = []
    for wanted in (True, False):
        leaf = x.clone().requires_grad_()
        w = weight.clone().requires_grad_(wanted)
        y = reduced(leaf, ints(0, 3, 30)[None], backend, weight=w, reduce=reduce)
        y.square().sum().backward()
        assert (w.grad is not None) == wanted
        found.append(leaf.grad)
    assert torch.equal(*found)


@each_backend
def test_mass_is_conserved(backend):
    """The weighted means weigh as much as the rows, and a mean of equal rows is that row."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 12, generator=g), torch.rand(50, generator=g)
    offsets = ints(0, 7, 7, 31, 50)
    y, sizes = reduced(x, offsets, backend, weight=weight, reduce="mean", return_weight_sum=True)
    torch.testing.assert_close(sizes.sum(), weight.sum())
    torch.testing.assert_close((sizes[:, None] * y).sum(0), (weight[:, None] * x).sum(0))
    same = reduced(x[:1].expand(50, 12), offsets, backend, weight=weight, reduce="mean")
    torch.testing.assert_close(same[[0, 2, 3]], x[:1].expand(3, 12))


@each_backend
def test_places_outside_all_segments_are_not_read(backend):
    x = torch.ones(1, 3, 2)
    perm = ints(99, 1, 0, -7, 99)[None]
    y = reduced(x, ints(1, 3)[None], backend, perm=perm)
    assert y.tolist() == [[[2.0, 2.0]]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_of_tokens_that_come_twice_the_lowest_is_named(backend):
    perm = torch.tensor([[4, 4, 1, 1]], dtype=torch.int32)
    offsets = torch.tensor([[0, 4]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"perm: must not name a token twice; got 1$"):
        tm.segment_reduce(torch.zeros(1, 5, 2), offsets, perm=perm, backend=backend)
