"""reconstruct_tokens against its definition, its gradient, ties and non-finite values."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

of_the_cpu = pytest.mark.skipif("cpu" not in backends(), reason="of the CPU kernels")


def by_definition(f, s, z, k, tau, norm):
    f, s, z = (t.double() for t in (f, s, z))
    d = (f[:, :, None] - s[:, None]).square().sum(-1)
    index = torch.empty(*f.shape[:2], k, dtype=torch.int64)
    for b in range(f.shape[0]):
        for n in range(f.shape[1]):
            order = sorted(range(s.shape[1]), key=lambda m: (d[b, n, m].item(), m))
            index[b, n] = torch.tensor(sorted(order[:k]))
    near = d.gather(2, index)
    w = torch.exp(-tau * (near - near.amin(2, keepdim=True)))
    w = w / w.norm(1 if norm == "l1" else 2, 2, keepdim=True)
    weights = torch.zeros_like(d).scatter(2, index, w)
    return weights @ z, index.int(), w


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@examples(8)
@given(
    batch=st.integers(1, 2),
    tokens=st.sampled_from([0, 1, 5, 13]),
    count=st.sampled_from([1, 2, 7, 65, 70]),
    channels=st.integers(1, 18),
    wide=st.integers(1, 20),
    k=st.integers(1, 40),
    norm=st.sampled_from(["l1", "l2"]),
    seed=st.integers(0, 2**31),
)
def test_the_definition(batch, tokens, count, channels, wide, k, norm, seed, backend, isa):
    """Integers: distances are exact, and many are equal."""
    g = torch.Generator().manual_seed(seed)
    f = torch.randint(-2, 3, (batch, tokens, channels), generator=g).float()
    s = torch.randint(-2, 3, (batch, count, channels), generator=g).float()
    z = torch.randn(batch, 2 * count, wide + 3, generator=g)[:, ::2, 2:-1]
    there = [t.to(device_of(backend)) for t in (f, s, z)]
    there[2].requires_grad_()
    k = min(k, count)
    out, index, weight = tm.reconstruct_tokens(*there, k=k, tau=0.1, norm=norm, backend=backend)
    want = by_definition(f, s, z, k, 0.1, norm)
    assert torch.equal(index.cpu(), want[1])
    torch.testing.assert_close(weight.cpu(), want[2].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.detach().cpu(), want[0].float(), rtol=1e-5, atol=1e-5)
    dout = torch.randn(out.shape, generator=g)
    (dz,) = torch.autograd.grad(out, there[2], dout.to(out.device))
    weights = torch.zeros(batch, tokens, count).scatter(2, want[1].long(), want[2].float())
    torch.testing.assert_close(dz.cpu(), weights.mT @ dout, rtol=1e-5, atol=1e-5)


@each_backend
def test_constants_stay_with_weights_that_sum_to_one(backend):
    f, s = torch.randn(1, 9, 8), torch.randn(1, 12, 8)
    there = [t.to(device_of(backend)) for t in (f, s, torch.full((1, 12, 5), 2.5))]
    out, _, weight = tm.reconstruct_tokens(*there, k=4, tau=0.3, backend=backend)
    torch.testing.assert_close(out.cpu(), torch.full((1, 9, 5), 2.5))
    unit = tm.reconstruct_tokens(*there, k=4, tau=0.3, norm="l2", backend=backend)[2]
    torch.testing.assert_close(unit, weight / weight.norm(dim=2, keepdim=True))


@each_backend
def test_far_from_all_centroids_weights_do_not_vanish(backend):
    f = torch.full((1, 1, 4), 100.0)
    s = torch.arange(3.0).view(1, 3, 1).expand(1, 3, 4).contiguous()
    there = [t.to(device_of(backend)) for t in (f, s, s)]
    out, index, weight = tm.reconstruct_tokens(*there, k=2, tau=10.0, backend=backend)
    assert index.tolist() == [[[1, 2]]]
    assert weight.tolist() == [[[0, 1]]]
    assert out.tolist() == [[[2.0] * 4]]


@each_backend
def test_rows_that_are_not_finite(backend):
    f, s = torch.zeros(1, 2, 3), torch.ones(1, 4, 3)
    f[0, 1, 0] = torch.nan
    s[0, 1] = torch.nan
    z = torch.arange(4.0).view(1, 4, 1)
    there = [t.to(device_of(backend)) for t in (f, s, z)]
    out, index, weight = tm.reconstruct_tokens(*there, k=3, tau=1.0, backend=backend)
    assert index.tolist() == [[[0, 2, 3], [0, 1, 2]]]
    torch.testing.assert_close(out[0, 0].cpu(), torch.tensor([5 / 3]))
    assert weight[0, 1].isnan().all() and out[0, 1].isnan().all()


def near_sets(case, g):
    """Tokens and centroids whose distances are integers, exact in float32 in any order."""
    count, channels = 400, 130
    bases = {"few near": 60, "all alike": 2, "far from zero": 60}.get(case, 400)
    rows = torch.randint(-80, 81, (bases, channels), generator=g).float()
    s = rows[torch.randint(0, bases, (count,), generator=g)]
    changed = torch.rand(count, channels, generator=g) < 0.02
    s = s + changed * torch.randint(-1, 2, (count, channels), generator=g)
    f = rows[torch.randint(0, bases, (300,), generator=g)]
    f = f + torch.randint(-3, 4, f.shape, generator=g)
    if case == "far from zero":
        s, f = s + 5000, f + 5000
    if case == "not finite":
        f[7, 3], f[8, 0], s[9, 1], f[11] = torch.nan, torch.inf, -torch.inf, 1e25
    if case == "rows not finite":
        f[7, 3], f[8, 0], f[11] = torch.nan, torch.inf, 1e25
    return f, s


@of_the_cpu
@pytest.mark.parametrize("isa", tm.testing.cpu_isas(), indirect=True)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "case",
    ["apart", "few near", "all alike", "far from zero", "not finite", "rows not finite"],
)
def test_products_that_screen_a_set_change_nothing(case, k, isa):
    """The set is large enough for screening. Ties of distances go to the first, also with
    non-finite values."""
    f, s = near_sets(case, torch.Generator().manual_seed(0))
    d = (f.double()[:, None] - s.double()).square().sum(-1)
    maximum = torch.finfo(torch.float32).max
    d = torch.where(d <= maximum, d, maximum)
    want = d.sort(dim=1, stable=True).indices[:, :k].sort(1).values.int()
    z = torch.zeros(len(s), 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if case == "far from zero" and dtype != torch.float32:
            continue
        there = [t.to(dtype)[None] for t in (f, s, z)]
        _, index, _ = tm.reconstruct_tokens(*there, k=k, tau=0.0, backend="cpu")
        assert torch.equal(index[0], want)


@of_the_cpu
@pytest.mark.parametrize("isa", tm.testing.cpu_isas(), indirect=True)
def test_a_screened_set_has_the_same_bits_as_a_small_one(isa):
    """A single token is compared with all centroids; many tokens are screened first."""
    g = torch.Generator().manual_seed(0)
    for scale, offset in ((1.0, 0.0), (0.01, 1.0), (1e-20, 0.0)):
        f, s = (torch.randn(1, n, 131, generator=g) * scale + offset for n in (300, 400))
        z = torch.randn(1, 400, 2, generator=g)
        want = [tm.reconstruct_tokens(f[:, i : i + 1], s, z, k=2, tau=1.0, backend="cpu")
                for i in range(300)]  # fmt: skip
        got = tm.reconstruct_tokens(f, s, z, k=2, tau=1.0, backend="cpu")
        for name, parts in zip(got, zip(*want, strict=True), strict=True):
            assert torch.equal(name, torch.cat(parts, 1))


@of_the_cpu
def test_more_sets_than_a_screen_holds():
    g = torch.Generator().manual_seed(0)
    f, s = torch.randn(8, 300, 256, generator=g), torch.randn(8, 1100, 256, generator=g)
    z = torch.randn(8, 1100, 2, generator=g)
    want = [tm.reconstruct_tokens(f[b : b + 1], s[b : b + 1], z[b : b + 1], k=2, tau=1.0,
                                  backend="cpu") for b in range(8)]  # fmt: skip
    got = tm.reconstruct_tokens(f, s, z, k=2, tau=1.0, backend="cpu")
    for name, parts in zip(got, zip(*want, strict=True), strict=True):
        assert torch.equal(name, torch.cat(parts))
