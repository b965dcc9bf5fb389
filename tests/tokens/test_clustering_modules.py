"""TokenClustering and TokenReconstruction against a literal reading of the published blocks."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from each import each_backend

import tokenmill as tm


def published_clusters(x, grid, iters, tau, window):
    """x [B, C, Y, X] to [B, gy gx, C]: a mask of 1e16 instead of a window, and expanded squares, in
    float64."""
    centroids = F.adaptive_avg_pool2d(x, grid).flatten(2).mT
    cells = torch.arange(grid[0] * grid[1], dtype=x.dtype).view(1, 1, *grid)
    home = F.interpolate(cells, x.shape[2:], mode="nearest").flatten().long()
    place = torch.stack([torch.arange(len(centroids[0])) // grid[1],
                         torch.arange(len(centroids[0])) % grid[1]])  # fmt: skip
    far = (place[:, home][:, :, None] - place[:, None]).abs().amax(0) > window // 2
    pixels = x.flatten(2).mT
    for _ in range(iters):
        d = squares(pixels, centroids) + far * 1e16
        q = (-tau * d).softmax(2)
        centroids = q.mT @ pixels / q.sum(1)[..., None].clamp(min=1e-16)
    return centroids


def squares(a, b):
    return a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None] - 2 * a @ b.mT


def published_tokens(x, centroids, clusters, k, tau):
    """All weights not below the k-th, divided by their Euclidean norm."""
    w = torch.exp(-tau * squares(x, centroids).clamp(min=0))
    w = F.normalize(torch.where(w < w.topk(k, 2).values[..., -1:], 0.0, w), dim=2)
    return w @ clusters


@each_backend
def test_the_published_blocks(backend):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 8, 10, generator=g)
    layer = torch.nn.Linear(10, 7)
    cluster = tm.nn.TokenClustering((2, 4), iters=2, tau=0.05, window=3, backend=backend)
    reconstruct = tm.nn.TokenReconstruction(tau=0.05, norm="l2", backend=backend)
    there = x.to(device_of(backend))
    centroids = cluster(there)
    values = layer.to(there.device)(centroids)
    out = reconstruct(there, centroids, values)
    want = published_clusters(x.double().permute(0, 3, 1, 2), (2, 4), 2, 0.05, 3)
    torch.testing.assert_close(centroids.flatten(1, 2).cpu(), want.float(), rtol=1e-5, atol=1e-5)
    pixels, clusters = x.double().flatten(1, 2), values.detach().cpu().double().flatten(1, 2)
    tokens = published_tokens(pixels, want, clusters, 3, 0.05)
    torch.testing.assert_close(out.detach().flatten(1, 2).cpu(), tokens.float(),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    out.sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_a_small_map_keeps_its_own_size():
    x = torch.randn(1, 3, 5, 4)
    centroids = tm.nn.TokenClustering(4)(x)
    assert centroids.shape == (1, 3, 4, 4)
    assert tm.nn.TokenReconstruction(20)(x, centroids, centroids).shape == x.shape


@pytest.mark.parametrize("module", ["TokenClustering", "TokenReconstruction"])
def test_examples(module):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    for test in finder.find(getattr(tm.nn, module), module):
        assert runner.run(test).failed == 0


def test_ranks_are_refused():
    with pytest.raises(RuntimeError, match="x: must have 4 dimensions"):
        tm.nn.TokenClustering(2)(torch.zeros(4, 3))
    with pytest.raises(RuntimeError, match="clusters: must have 4 dimensions"):
        tm.nn.TokenReconstruction()(torch.zeros(1, 2, 2, 3), torch.zeros(1, 1, 1, 3), torch.ones(2))
