"""TransNormerLayer against its authors' released code: Doraemonzzz's nanoTransNormer at d9e635a,
transnormer/model.py and transnormer/srms.py. Its layers after the first have positions, against its
own comment and the paper; here `lrpe` selects them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from literal import assert_reads_as, randomised
from tensors import close, every_backend

import tokenmill as tm
from tokenmill import nn

LAYERS = 5


def slopes_of(heads, layer):
    """2^(-8 h / H) for a power of two of heads, smaller in later layers."""
    return [2 ** (-8 * (h + 1) / heads) * (1 - layer / (LAYERS - 1) + 1e-5) for h in range(heads)]


def over_rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def reading(heads, layer):
    """Sums over pairs: the product of channel d of a head is weighted by the cosine of distance
    times the channel's angle."""

    def mixed(w, x):
        q, k, v, u = (x @ w["token_mixer.qkvu_proj.weight"].T).chunk(4, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (F.silu(q), F.silu(k), v))
        theta = w.get("token_mixer.lrpe.theta")
        rows = []
        for t in range(x.shape[1]):
            total = 0
            for s in range(t + 1):
                products = q[:, t] * k[:, s]  # [B, H, D]
                if theta is not None:
                    products = products * torch.cos(theta[:, 0] * (t - s))
                fade = torch.tensor([math.exp(-a * (t - s)) for a in slopes_of(heads, layer)])
                total = total + (fade * products.sum(-1))[..., None] * v[:, s]
            rows.append(total.flatten(1))
        return (u * over_rms(torch.stack(rows, 1))) @ w["token_mixer.out_proj.weight"].T

    def literal(w, x):
        x = x + mixed(w, over_rms(x))
        n = over_rms(x)
        up = (n @ w["channel_mixer.l1.weight"].T) * (n @ w["channel_mixer.l2.weight"].T)
        return x + up @ w["channel_mixer.l3.weight"].T

    return literal


@every_backend
@pytest.mark.parametrize("layer", [0, 3], ids=["positions", "no positions"])
def test_the_released_layer(layer, backend):
    module = nn.TransNormerLayer(8, 2, layer=layer, num_layers=LAYERS, glu_dim=6, backend=backend)
    assert (module.token_mixer.lrpe is not None) == (layer == 0)
    x = torch.randn(2, 9, 8, requires_grad=True)
    assert_reads_as(randomised(module), reading(2, layer), x, backend=backend, tolerance=1e-4)


@every_backend
@pytest.mark.parametrize("layer", [0, 3], ids=["positions", "no positions"])
def test_prompts_and_single_tokens(layer, backend):
    module = nn.TransNormerLayer(8, 2, layer=layer, num_layers=LAYERS, backend=backend)
    module = randomised(module).to(device_of(backend))
    x = torch.randn(2, 12, 8, device=device_of(backend))
    state, parts = None, []
    with torch.no_grad():
        for part in x.split([6, 3, 1, 1, 1], 1):
            y, state = module(part, state, return_state=True)
            parts.append(y)
        close(torch.cat(parts, 1), module(x), 1e-4)
    assert state.length.tolist() == [12, 12]
    assert state.kv.shape[2] == (8 if layer == 0 else 4)


def test_names_and_angles_of_the_released_models():
    layer = nn.TransNormerLayer(16, 4, layer=0, num_layers=LAYERS, glu_dim=24)
    shapes = {name: list(t.shape) for name, t in layer.state_dict().items()}
    assert shapes == {
        "token_mixer.qkvu_proj.weight": [64, 16],
        "token_mixer.out_proj.weight": [16, 16],
        "token_mixer.lrpe.theta": [4, 1, 4],
        "channel_mixer.l1.weight": [24, 16],
        "channel_mixer.l2.weight": [24, 16],
        "channel_mixer.l3.weight": [16, 24],
    }
    angles = [10000 ** (-2 * i / 16) for i in range(16)]
    close(layer.token_mixer.lrpe.theta.flatten(), torch.tensor(angles), 1e-6)


def test_slopes_stay_float32_and_16_bits_run():
    layer = nn.TransNormerLayer(8, 2, layer=1, num_layers=LAYERS)
    exact = layer.token_mixer.slopes.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.token_mixer.slopes, exact) and exact.dtype == torch.float32
    assert layer(torch.randn(1, 4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    paper = nn.TransNormerLayer(8, 2, layer=1, num_layers=LAYERS, convention="paper")
    assert torch.equal(
        paper.token_mixer.slopes, tm.lightning_slopes(2, 1, LAYERS, convention="paper")
    )


def test_far_positions_in_16_bits_are_those_of_float32():
    """Rounding of an angle at position 1,000,000 does not flip signs."""
    mix = nn.TransNormerAttention(8, 2, layer=0, num_layers=LAYERS).eval()
    x = torch.randn(1, 3, 8)
    state = mix(x, return_state=True)[1]._replace(length=torch.tensor([1_000_000]))
    state = state._replace(kv=torch.zeros_like(state.kv))
    with torch.no_grad():
        wanted = mix(x, state)
        found = mix.to(torch.bfloat16)(x.bfloat16(), state).float()
    assert (found - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: nn.TransNormerLayer(8, 3, layer=0, num_layers=2),
            "TransNormerAttention: num_heads: must divide dim, 8; got 3",
        ),
        (
            lambda: nn.TransNormerLayer(512, 2, layer=0, num_layers=2),
            "TransNormerAttention: num_heads: must leave heads of at most 128; got 256",
        ),
        (
            lambda: nn.TransNormerLayer(8, 2, layer=2, num_layers=2),
            "lightning_slopes: layer: must be from 0 to 1; got 2",
        ),
        (
            lambda: nn.TransNormerLayer(8, 2, layer=0, num_layers=2, glu_dim=0),
            r"TransNormerLayer: glu_dim: must be 1 to 2\^31 - 1; got 0",
        ),
        (
            lambda: nn.TransNormerLayer(8, 2, layer=0, num_layers=2)(torch.zeros(2, 8)),
            r"TransNormerLayer: x: must have shape \[B, N, 8\]; got \[2, 8\]",
        ),
        (
            lambda: nn.TransNormerLayer(8, 2, layer=0, num_layers=2)(
                torch.zeros(2, 1, 8), nn.TransNormerState(torch.zeros(2, 2, 4, 4), torch.zeros(2))
            ),
            r"TransNormerAttention: state: must have kv of shape \[2, 2, 8, 4\]; got .*",
        ),
    ],
)
def test_bad_calls(call, says):
    with pytest.raises(RuntimeError, match=rf"^tokenmill\.(nn\.)?{says}$"):
        call()
