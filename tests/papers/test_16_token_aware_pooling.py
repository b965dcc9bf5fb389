"""TokenAwarePooling and AttentionDiversificationLoss against Guo et al. 2023, section 3, and the
release (guoyongcs/TAPADL at 6e4dbff, TAPADL_FAN/models/convnext_utils.py and main.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from literal import assert_reads_as, randomised
from tensors import each_backend

import tokenmill as tm


def token_aware_pooling(w, x, *, layer):
    """Neighbors as shifted copies of a padded map; batch norm by its formula."""
    rows, columns = x.shape[1:3]
    maps = x.permute(0, 3, 1, 2)
    z = F.conv2d(maps, w["proj.0.weight"], padding=1)
    norm = layer.proj[1]
    if layer.training:
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    else:
        mean, var = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    z = (z - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
    z = z * w["proj.1.weight"][:, None, None] + w["proj.1.bias"][:, None, None]
    m = torch.softmax(F.conv2d(z, w["proj.2.weight"], padding=1) / layer.temperature, 1)
    y = m[:, :1] * maps
    for k in range(1, layer.num_scales):
        wide = F.pad(maps, (k, k, k, k))
        window = [
            wide[:, :, k + i * k : k + i * k + rows, k + j * k : k + j * k + columns]
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
        y = y + m[:, k : k + 1] * torch.stack(window).sum(0) / 9
    return y.permute(0, 2, 3, 1)


def reading(layer):
    return lambda w, x: token_aware_pooling(w, x, layer=layer)


@each_backend
@pytest.mark.parametrize(
    ("shape", "scales", "temperature", "training"),
    [
        ((2, 14, 14, 24), 4, 1.0, True),  # published defaults
        ((2, 3, 5, 6), 4, 0.5, True),  # dilations as wide as the map
        ((1, 1, 2, 3), 3, 2.0, False),
        ((2, 4, 3, 5), 1, 1.0, True),
    ],
)
def test_the_equations(shape, scales, temperature, training, backend):
    layer = tm.nn.TokenAwarePooling(shape[3], scales, temperature=temperature, backend=backend)
    randomised(layer).train(training)
    if not training:
        layer.proj[1].running_mean.uniform_(-1, 1)
        layer.proj[1].running_var.uniform_(0.5, 2)
    x = torch.randn(shape, requires_grad=True)
    assert_reads_as(layer, reading(layer), x, backend=backend, tolerance=5e-5)


def test_one_scale_is_the_identity():
    x = torch.randn(1, 4, 4, 3)
    assert torch.equal(tm.nn.TokenAwarePooling(3, 1)(x), x)
    assert tm.nn.TokenAwarePooling(3)(torch.zeros(0, 4, 4, 3)).shape == (0, 4, 4, 3)


def published_loss(attention, threshold):
    """Loss of the attention maps [B, H, N, N] of layers, row by row."""
    layers = []
    for weights in attention:
        cosines = []
        for rows in weights.mean(1):
            minimum = threshold / len(rows)
            mean = rows.mean(0)
            mean = mean * (mean > minimum)
            for row in rows:
                kept = row * (row > minimum)
                both = (kept.norm() * mean.norm()).clamp(min=1e-8)
                cosines.append((kept * mean).sum() / both)
        layers.append(torch.stack(cosines).mean())
    return torch.stack(layers).mean()


@pytest.mark.parametrize(("tokens", "threshold", "tile"), [(49, 2.0, 16), (5, 0.5, 2), (1, 0.0, 1)])
def test_the_loss(tokens, threshold, tile):
    loss = tm.nn.AttentionDiversificationLoss(threshold)
    pairs = [(torch.randn(2, tokens, 3, 8) * 2).double().requires_grad_() for _ in range(4)]
    layers = [pairs[:2], pairs[2:]]
    got = loss(*(loss.mean_map(q, k, tile=tile) for q, k in layers))
    maps = [torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5, 3) for q, k in layers]
    want = published_loss(maps, threshold)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y, pairs) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_equal_rows_are_alike_and_different_ones_are_not():
    loss = tm.nn.AttentionDiversificationLoss()
    same = torch.zeros(1, 8, 8)
    same[:, :, 3] = 1
    assert loss(same).item() == pytest.approx(1)
    assert loss(torch.eye(8)[None]).item() == 0  # the mean row is below the threshold
    assert loss(torch.full((1, 8, 8), 1 / 8)).item() == 0


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.TokenAwarePooling(8, 0), "TokenAwarePooling: num_scales: must be 1 to 655"),
        (lambda: tm.nn.TokenAwarePooling(8)(torch.zeros(1, 3, 8)),
         r"TokenAwarePooling: x: must have shape \[B, Y, X, 8\]; got \[1, 3, 8\]"),
        (lambda: tm.nn.AttentionDiversificationLoss()(),
         "AttentionDiversificationLoss: maps: must be at least one tensor; got 0"),
        (lambda: tm.nn.AttentionDiversificationLoss()(torch.zeros(1, 2, 3)),
         r"AttentionDiversificationLoss: maps: must have shape \[B, N, N\]"),
        (lambda: tm.nn.AttentionDiversificationLoss.mean_map(
            torch.zeros(1, 2, 1, 4), torch.zeros(1, 3, 1, 4)),
         "AttentionDiversificationLoss: k: must have shape and dtype of q"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.{error}"):
        call()


def test_maps_lie_on_one_device():
    maps = torch.ones(1, 3, 3), torch.ones(1, 3, 3, device="meta")
    rule = "nn.AttentionDiversificationLoss: maps: must be on the device of the first map, cpu"
    with pytest.raises(RuntimeError, match=rule):
        tm.nn.AttentionDiversificationLoss()(*maps)
