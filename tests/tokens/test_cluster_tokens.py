"""cluster_tokens against a literal reading, its gradient with soft weights, and edge cases."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, cpu_variants, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm


def by_definition(x, gy, gx, iters, tau, window, window_labels):
    """Clusters one image in float64, pixel by pixel."""
    height, width, channels = x.shape
    x = x.double()
    c = torch.zeros(gy, gx, channels, dtype=torch.float64)
    for i in range(gy):
        for j in range(gx):
            rows = slice(i * height // gy, -(-(i + 1) * height // gy))
            c[i, j] = x[rows, j * width // gx : -(-(j + 1) * width // gx)].mean((0, 1))
    near = torch.zeros(height, width, gy, gx, dtype=torch.bool)
    for y in range(height):
        for z in range(width):
            for i in range(gy):
                for j in range(gx):
                    far = max(abs(y * gy // height - i), abs(z * gx // width - j))
                    near[y, z, i, j] = far <= window // 2
    near = near.flatten(2)
    for _ in range(iters):
        d = (x[:, :, None] - c.flatten(0, 1)).square().sum(-1)
        q = torch.softmax((-tau * d).masked_fill(~near, -torch.inf), -1)
        mass = q.sum((0, 1))
        c = (torch.einsum("yxm,yxc->mc", q, x) / mass[:, None]).view(gy, gx, channels)
    d = (x[:, :, None] - c.flatten(0, 1)).square().sum(-1)
    if window_labels:
        d = d.masked_fill(~near, torch.inf)
    return c, d.argmin(-1).int(), mass.view(gy, gx), q


def call(backend, x, *args, **options):
    found = tm.cluster_tokens(x.to(device_of(backend)), *args, backend=backend, **options)
    return [t.cpu() for t in found]


@pytest.mark.parametrize(("backend", "isa"), cpu_variants(), indirect=["isa"], ids=str)
@examples(5)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    parts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 20),
    iters=st.integers(1, 2),
    window=st.sampled_from([1, 3, 5, 99]),
    window_labels=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_definition(
    height, width, parts, channels, iters, window, window_labels, seed, backend, isa
):
    gy, gx = min(parts[0], height), min(parts[1], width)
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(1, height, 2 * width, channels + 3, generator=g)
    x = wide[:, :, ::2, 2:-1]
    tau = 1 / channels
    options = {"iters": iters, "tau": tau, "window": window, "window_labels": window_labels}
    centroids, labels, mass = call(backend, x, (gy, gx), **options)
    want = by_definition(x[0], gy, gx, iters, tau, window, window_labels)
    for got, wanted in zip((centroids[0], labels[0], mass[0]), want, strict=False):
        torch.testing.assert_close(got, wanted.to(got.dtype), rtol=2e-5, atol=2e-5)


@each_backend
def test_the_gradient_takes_soft_weights_as_constants(backend):
    x = torch.randn(1, 6, 7, 5, requires_grad=True)
    there = x.detach().to(device_of(backend)).requires_grad_()
    options = {"iters": 2, "tau": 0.3, "window": 3}
    centroids, _, mass = tm.cluster_tokens(there, (2, 3), backend=backend, **options)
    dc = torch.randn(1, 2, 3, 5)
    (dx,) = torch.autograd.grad(centroids, there, dc.to(there.device))
    *_, q = by_definition(x.detach()[0], 2, 3, 2, 0.3, 3, False)
    want = torch.einsum("yxm,mc->yxc", q / q.sum((0, 1)), dc[0].flatten(0, 1).double())
    torch.testing.assert_close(dx[0].cpu(), want.float(), rtol=1e-5, atol=1e-6)
    assert not mass.requires_grad


@each_backend
def test_a_cluster_without_mass_keeps_its_centroid_and_has_no_gradient(backend):
    """The middle cell starts at the mean of two colors, and its pixels go to its neighbors."""
    x = torch.tensor([0.0, 0, 0, 1e4, 1e4, 1e4]).view(1, 1, 6, 1).to(device_of(backend))
    x.requires_grad_()
    centroids, labels, mass = tm.cluster_tokens(x, (1, 3), iters=2, tau=1.0, window=3,
                                                backend=backend)  # fmt: skip
    assert centroids.flatten().tolist() == [0, 5000, 1e4]
    assert mass.flatten().tolist() == [3, 0, 3]
    assert labels.flatten().tolist() == [0, 0, 0, 2, 2, 2]
    (dx,) = torch.autograd.grad(centroids.sum(), x)
    torch.testing.assert_close(dx.flatten().cpu(), torch.full((6,), 1 / 3))


@each_backend
def test_equal_pixels(backend):
    """Weights are uniform, and ties of distances go to the first."""
    centroids, labels, mass = call(backend, torch.full((1, 4, 4, 9), 3.0), 2, tau=1.0, window=99)
    assert torch.equal(centroids, torch.full((1, 2, 2, 9), 3.0))
    assert torch.equal(labels, torch.zeros_like(labels))
    torch.testing.assert_close(mass, torch.full_like(mass, 4.0))


@each_backend
def test_colours_far_from_zero_do_not_cancel(backend):
    """Squares of 3000 would leave no digit for differences of 1."""
    x = torch.tensor([0.0, 0, 1, 1]).view(1, 1, 4, 1).expand(1, 1, 4, 6) + 3000
    centroids, labels, _ = call(backend, x, (1, 2), iters=3, tau=10.0)
    torch.testing.assert_close(centroids[0, 0, :, 0], torch.tensor([3000.0, 3001.0]))
    assert labels.flatten().tolist() == [0, 0, 1, 1]


@each_backend
def test_nan_stays_in_reach(backend):
    x = torch.zeros(1, 1, 12, 3)
    x[..., 6:, :] = 1
    x[0, 0, 0, 1] = torch.nan
    centroids, labels, mass = call(backend, x, (1, 6), iters=1, tau=1.0, window=3)
    assert centroids[0, 0, :2, 1].isnan().all() and mass[0, 0, :2].isnan().all()
    assert centroids[0, 0, 3:].isfinite().all() and mass[0, 0, 3:].isfinite().all()
    assert labels.min() >= 0 and labels.max() < 6


@pytest.mark.parametrize("backend", [b for b in backends() if b != "triton"])
def test_many_pixels(backend, threads):
    """More pixels than one chunk of an image, whose sums are added in order, and more clusters than
    a tile has columns."""
    g = torch.Generator().manual_seed(0)
    cells, channels = (11, 16) if backend == "emulated" else (24, 96)
    colours = torch.randn(1, cells, cells, channels, generator=g)
    x = colours.repeat_interleave(2, 1).repeat_interleave(2, 2)
    x = (x + 0.01 * torch.randn(x.shape, generator=g)).requires_grad_()

    def run():
        found = tm.cluster_tokens(x.to(device_of(backend)), cells, iters=1, tau=0.1, window=7,
                                  backend=backend)  # fmt: skip
        dx = torch.autograd.grad(found[0].square().sum(), x)
        return [t.detach().cpu() for t in (*found, *dx)]

    pixels = x.detach().double().flatten(1, 2)
    c = pixels.view(cells, 2, cells, 2, channels).mean((1, 3)).flatten(0, 1)
    home = torch.arange(2 * cells) // 2
    near = (home[:, None] - torch.arange(cells)).abs() <= 3
    near = (near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    q = (-0.1 * torch.cdist(pixels[0], c).square()).masked_fill(~near, -torch.inf).softmax(1)
    c = q.T @ pixels[0] / q.sum(0)[:, None]
    labels = torch.cdist(pixels[0], c).argmin(1)
    dx = q / q.sum(0) @ (2 * c)
    threads(1)
    first = run()
    for got, wanted in zip(first, (c, labels, q.sum(0), dx), strict=True):
        torch.testing.assert_close(got.flatten(), wanted.flatten().to(got.dtype),
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
    threads(3)
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.skipif("triton" not in backends(), reason="needs Triton")
@pytest.mark.parametrize("window_labels", [False, True])
def test_slabs_of_triton(window_labels, monkeypatch):
    """Memory holds the distances of one row of cells, or of a few pixels, at a time."""
    from tokenmill.triton_kernels.tokens import cluster_tokens as cluster
    from tokenmill.triton_kernels.tokens import nearest

    x = torch.randn(1, 7, 3, 5).to(device_of("triton")).requires_grad_()
    options = {"iters": 2, "tau": 0.3, "window": 3, "window_labels": window_labels}

    def run():
        found = tm.cluster_tokens(x, (4, 2), backend="triton", **options)
        return [*found, *torch.autograd.grad(found[0].square().sum(), x)]

    want = run()
    monkeypatch.setattr(cluster, "SLAB", 64)
    monkeypatch.setattr(nearest, "SLAB", 16)
    for got, wanted in zip(run(), want, strict=True):
        torch.testing.assert_close(got, wanted)
