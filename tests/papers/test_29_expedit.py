"""Expedit (Liang et al. 2022) against the released vision transformers (hourglass_image_encoder.py
of Expedit-LargeScale-Vision-Transformer/Expedit-SAM at 75a1c30)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from literal import assert_reads_as, randomised
from tensors import each_backend

import tokenmill as tm


def squares(a, b):
    return a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None] - 2 * a @ b.mT


def clustered(x, grid, iters, tau, window):
    """x [B, Y, X, C] to centroids [B, gy, gx, C]: a distance of 1e16 to clusters outside the
    window, and weights without a gradient."""
    batch, height, width, channels = x.shape
    centroids = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).flatten(2).mT
    cells = torch.arange(grid[0] * grid[1], dtype=x.dtype)
    home = F.interpolate(cells.view(1, 1, *grid), (height, width), mode="nearest").flatten().long()
    place = torch.stack([cells // grid[1], cells % grid[1]])
    far = (place[:, home][:, :, None] - place[:, None]).abs().amax(0) > window // 2
    pixels = x.flatten(1, 2)
    for _ in range(iters):
        q = (-tau * (squares(pixels, centroids) + far * 1e16)).softmax(2).detach()
        centroids = q.mT @ pixels / q.sum(1)[..., None].clamp(min=1e-16)
    return centroids.view(batch, *grid, channels)


def reconstructed(x, centroids, clusters, k, tau):
    """Weights of the k nearest clusters, divided by their Euclidean norm."""
    batch, height, width, channels = x.shape
    rows = [t.flatten(1, 2) for t in (x, centroids, clusters)]
    w = torch.exp(-tau * squares(rows[0], rows[1]).clamp(min=0)).detach()
    w = F.normalize(torch.where(w < w.topk(k, 2).values[..., -1:], 0.0, w), dim=2)
    return (w @ rows[2]).view(batch, height, width, channels)


class Block(torch.nn.Module):
    """Attention and an MLP, on rows or maps."""

    def __init__(self, dim):
        super().__init__()
        self.qkv, self.mlp = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def forward(self, x):
        return block(dict(self.named_parameters()), x)


def block(w, x):
    rows = x.reshape(len(x), -1, x.shape[-1])
    q, k, v = F.linear(rows, w["qkv.weight"], w["qkv.bias"]).chunk(3, 2)
    rows = rows + (q @ k.mT).softmax(2) @ v
    return (rows + F.linear(rows, w["mlp.weight"], w["mlp.bias"]).tanh()).view(x.shape)


def weights_of(w, i):
    return {n.removeprefix(f"blocks.{i}."): t for n, t in w.items() if n.startswith(f"blocks.{i}.")}


def plain(w, x, shape=None, *, depth, start, end, grid, prefix, settings):
    """Segmenter and DPT: one map, preceded by a class token."""
    side = shape or (math.isqrt(x.shape[1] - prefix),) * 2
    for i in range(depth):
        if i == start:
            tokens = x[:, prefix:].unflatten(1, side)
            centroids = clustered(tokens, grid, settings.iters, settings.tau, settings.window)
            x = torch.cat([x[:, :prefix], centroids.flatten(1, 2)], 1)
        x = block(weights_of(w, i), x)
        if i == end - 1:
            small = x[:, prefix:].unflatten(1, grid)
            back = reconstructed(tokens, centroids, small, settings.k, settings.tau)
            x = torch.cat([x[:, :prefix], back.flatten(1, 2)], 1)
    return x


def windowed(w, x, *, depth, start, grid, side, settings):
    """SAM: maps without a class token; each attention window is clustered separately, and the
    clusters of all windows form one map."""
    batch, height, width, channels = x.shape
    for i in range(start):
        x = block(weights_of(w, i), x)
    rows, columns = -(-height // side), -(-width // side)
    full = F.pad(x, (0, 0, 0, columns * side - width, 0, rows * side - height))
    small = x.new_zeros(batch, rows * grid, columns * grid, channels)
    kept = {}
    for i in range(rows):
        for j in range(columns):
            tokens = full[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
            found = clustered(tokens, (grid, grid), settings.iters, settings.tau, settings.window)
            kept[i, j] = tokens, found
            small[:, i * grid : (i + 1) * grid, j * grid : (j + 1) * grid] = found
    for i in range(start, depth):
        small = block(weights_of(w, i), small)
    back = torch.zeros_like(full)
    for (i, j), (tokens, centroids) in kept.items():
        mine = small[:, i * grid : (i + 1) * grid, j * grid : (j + 1) * grid]
        found = reconstructed(tokens, centroids, mine, settings.k, settings.tau)
        back[:, i * side : (i + 1) * side, j * side : (j + 1) * side] = found
    return back[:, :height, :width]


class Settings:
    """Settings under the release's names."""

    def __init__(self, iters, tau, window, k):
        self.iters, self.tau, self.window, self.k = iters, tau, window, k


RELEASED = {
    "segmenter": Settings(5, 0.05, 7, 3),
    "sam": Settings(5, 0.01, 5, 20),
    "depth": Settings(5, 1.0, 5, 20),
    "swin": Settings(5, 1 / 200, 7, 3),
    "detection": Settings(3, 1 / 100, 5, 25),
}


@pytest.mark.parametrize("preset", RELEASED)
def test_presets(preset):
    wanted = RELEASED[preset]
    cluster = tm.nn.TokenClustering(9, preset=preset)
    assert (cluster.iters, cluster.tau, cluster.window) == (
        wanted.iters, wanted.tau, wanted.window,
    )  # fmt: skip
    reconstruct = tm.nn.TokenReconstruction(preset=preset)
    assert (reconstruct.k, reconstruct.tau, reconstruct.norm) == (wanted.k, wanted.tau, "l2")
    assert tm.nn.TokenClustering(9, preset=preset, tau=3).tau == 3
    assert tm.nn.TokenReconstruction(1, preset=preset, norm="l1").k == 1


@each_backend
@pytest.mark.parametrize(
    ("preset", "end", "shape", "prefix"),
    [("segmenter", None, None, 1), ("depth", 3, (6, 9), 1), ("detection", 2, (8, 6), 2)],
)
def test_middle_blocks_see_clusters(preset, end, shape, prefix, backend):
    torch.manual_seed(0)
    grid = (5, 5) if preset == "detection" else (4, 6)
    layers = randomised(torch.nn.ModuleList(Block(8) for _ in range(4)))
    options = {"preset": preset, "prefix": prefix, "backend": backend}
    expedited = tm.nn.ExpeditedBlocks(layers, 1, end, grid, **options)
    count = math.prod(shape or (7, 7))
    x = torch.randn(2, prefix + count, 8, requires_grad=True)
    settings = {"start": 1, "end": end or 4, "grid": grid, "prefix": prefix, "depth": 4,
                "settings": RELEASED[preset]}  # fmt: skip

    def literal(w, x, shape):
        return plain(w, x, shape, **settings)

    assert_reads_as(expedited, literal, x, shape, backend=backend, tolerance=1e-4)


@each_backend
def test_windows_of_a_map(backend):
    torch.manual_seed(0)
    layers = [randomised(Block(8)) for _ in range(3)]
    options = {"preset": "sam", "prefix": 0, "partition": 7, "k": 16, "backend": backend}
    expedited = tm.nn.ExpeditedBlocks(layers, 1, None, 4, **options)
    settings = Settings(5, 0.01, 5, 16)  # all clusters: some padding clusters are equally near

    def literal(w, x):
        return windowed(w, x, depth=3, start=1, grid=4, side=7, settings=settings)

    x = torch.randn(1, 12, 17, 8, requires_grad=True)
    assert_reads_as(expedited, literal, x, backend=backend, tolerance=1e-4)


def test_the_middle_blocks_see_as_many_tokens_as_clusters():
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return x

    expedited = tm.nn.ExpeditedBlocks([Watch() for _ in range(4)], 1, 3, (2, 3))
    x = torch.randn(2, 1 + 64, 4)
    y = expedited(x)
    assert seen == [(2, 65, 4), (2, 7, 4), (2, 7, 4), (2, 65, 4)]
    assert torch.equal(y[:, 0], x[:, 0])
    seen.clear()
    maps = tm.nn.ExpeditedBlocks([Watch() for _ in range(2)], 1, None, 3, prefix=0, partition=5)
    assert maps(torch.randn(1, 10, 12, 4)).shape == (1, 10, 12, 4)
    assert seen == [(1, 10, 12, 4), (1, 6, 9, 4)]
    assert maps(torch.randn(0, 10, 12, 4)).shape == (0, 10, 12, 4)


def test_features_behind_blocks():
    torch.manual_seed(0)
    layers = [randomised(Block(8)) for _ in range(5)]
    expedited = tm.nn.ExpeditedBlocks(layers, 1, 4, 4)
    x = torch.randn(1, 1 + 49, 8)
    found = expedited.features(x, (0, 2, 3, 4))
    assert {tuple(t.shape) for t in found} == {(1, 50, 8)}
    torch.testing.assert_close(found[0], layers[0](x))
    shorter = tm.nn.ExpeditedBlocks(layers[:3], 1, None, 4)
    torch.testing.assert_close(found[1], shorter(x))
    torch.testing.assert_close(layers[4](found[2]), found[3])
    torch.testing.assert_close(expedited(x), found[3])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.TokenClustering(2, preset="vit"), "TokenClustering: preset: must be 'dep"),
        (lambda: blocks(4), "ExpeditedBlocks: start: must be 0 to 2; got 4"),
        (lambda: blocks(1, 1), "ExpeditedBlocks: end: must be 2 to 3; got 1"),
        (lambda: tm.nn.ExpeditedBlocks([], 0, None, 2),
         "ExpeditedBlocks: blocks: must be one or more mod"),
        (lambda: blocks(1, partition=0), "ExpeditedBlocks: partition: must be 1 to 256; got"),
        (lambda: blocks(1)(torch.zeros(1, 4, 4, 8)),
         "ExpeditedBlocks: x: must have shape [B, 1 + Y X, C] with Y X at least 1; got [1, 4, 4, "),
        (lambda: blocks(1)(torch.zeros(1, 13, 8)),
         "ExpeditedBlocks: shape: must be a pair (Y, X) with Y X = 12; got None"),
        (lambda: blocks(1)(torch.zeros(1, 13, 8), (2, 5)),
         "ExpeditedBlocks: shape: must be a pair (Y, X) with Y X = 12; got [2, 5]"),
        (lambda: blocks(1).features(torch.zeros(1, 10, 8), (2, 1)),
         "ExpeditedBlocks: layers: must be some of 0 to 2, ascending; got [2, 1]"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError) as info:
        call()
    assert str(info.value).startswith(f"tokenmill.nn.{error}")


def blocks(start, end=None, **options):
    return tm.nn.ExpeditedBlocks([torch.nn.Identity() for _ in range(3)], start, end, 2, **options)
