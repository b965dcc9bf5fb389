"""reconstruct_tokens against its definition, its gradient, ties and what is not finite."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenmill as tm

each_backend = pytest.mark.parametrize("backend", backends("reference"))


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
@settings(max_examples=8)
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
    """Whole numbers: distances are exact, and many are equal."""
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
