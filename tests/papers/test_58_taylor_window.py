"""The layers of Based against the released code: HazyResearch/based at 32c1bd4,
based/models/mixers/linear_attention.py and slide_attention.py, based/models/block.py and mlp.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from literal import assert_reads_as, randomised
from tensors import close, every_backend

from tokenmill import nn

DIM, HEADS, WINDOW = 8, 2, 3


def taylor(w, x, features):
    """Quadratic form: query features times key features, lower triangle, divided by their row sum
    plus 1e-12."""

    def mapped(t):
        t = t.unflatten(-1, (HEADS, features)).transpose(1, 2)
        square = (t[..., :, None] * t[..., None, :]).flatten(-2)
        ones = torch.ones_like(t[..., :1])
        return torch.cat([ones, t / features**0.25, square / math.sqrt(2 * features)], -1)

    q, k = (mapped(x @ w[f"proj_{name}.weight"].T) for name in "qk")
    v = (x @ w["proj_v.weight"].T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    weights = (q @ k.transpose(-1, -2)).tril()
    out = weights @ v / (weights.sum(-1, keepdim=True) + 1e-12)
    return out.transpose(1, 2).flatten(2) @ w["out_proj.weight"].T


def window(w, x, reach):
    """Token t sees tokens t - reach to t; channels i and i + D / 2 of queries and keys are rotated
    by t 10000^(-2 i / D)."""
    q, k, v = (x @ w["Wqkv.weight"].T).unflatten(-1, (3, HEADS, -1)).unbind(2)
    half = q.shape[-1] // 2
    turns = [
        torch.polar(
            torch.ones(half, dtype=torch.float64),
            t * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half),
        )
        for t in range(x.shape[1])
    ]

    def turned(row, t):
        y = torch.complex(*row.chunk(2, -1)) * turns[t]
        return torch.cat([y.real, y.imag], -1)

    rows = []
    for t in range(x.shape[1]):
        seen = range(max(t - reach, 0), t + 1)
        query = turned(q[:, t], t)
        z = torch.stack([(query * turned(k[:, s], s)).sum(-1) for s in seen], -1)
        p = (z / math.sqrt(2 * half)).softmax(-1)
        rows.append(sum(p[..., i, None] * v[:, s] for i, s in enumerate(seen)).flatten(1))
    return torch.stack(rows, 1) @ w["out_proj.weight"].T


def part(w, prefix):
    return {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)}


def layer(w, x, mix):
    def norm(t, weight):
        return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x = x + mix(part(w, "mixer."), norm(x, w["norm1.weight"]))
    values, gate = (norm(x, w["norm2.weight"]) @ w["mlp.fc1.weight"].T).chunk(2, -1)
    return x + (values * F.silu(gate)) @ w["mlp.fc2.weight"].T


@every_backend
@pytest.mark.parametrize("features", [16, 5])
def test_the_taylor_layer(features, backend):
    module = nn.TaylorAttention(DIM, HEADS, features, backend=backend)
    x = torch.randn(2, 9, DIM, requires_grad=True)
    assert_reads_as(
        randomised(module), lambda w, x: taylor(w, x, features), x, backend=backend, tolerance=1e-4
    )


@every_backend
@pytest.mark.parametrize("reach", [0, 3])
def test_the_window_layer(reach, backend):
    module = nn.WindowAttention(DIM, HEADS, reach, backend=backend)
    x = torch.randn(2, 9, DIM, requires_grad=True)
    assert_reads_as(
        randomised(module), lambda w, x: window(w, x, reach), x, backend=backend, tolerance=1e-4
    )


@every_backend
def test_the_block(backend):
    module = nn.TaylorWindowBlock(DIM, HEADS, window=WINDOW, mlp_dim=6, backend=backend)
    x = torch.randn(2, 9, DIM, requires_grad=True)

    def literal(w, x):
        x = layer(part(w, "layers.0."), x, lambda w, x: taylor(w, x, 16))
        return layer(part(w, "layers.1."), x, lambda w, x: window(w, x, WINDOW))

    assert_reads_as(randomised(module), literal, x, backend=backend, tolerance=2e-4)


@every_backend
def test_prompts_and_single_tokens(backend):
    module = nn.TaylorWindowBlock(DIM, HEADS, feature_dim=4, window=WINDOW, backend=backend)
    module = randomised(module).to(device_of(backend))
    x = torch.randn(2, 11, DIM, device=device_of(backend))
    state, parts = None, []
    with torch.no_grad():
        for tokens in x.split([2, 5, 1, 1, 2], 1):
            y, state = module(tokens, state, return_state=True)
            parts.append(y)
        close(torch.cat(parts, 1), module(x), 1e-4)
    assert state.k.shape[1] == WINDOW and state.length.tolist() == [11, 11]
    assert state.sums.shape == (2, HEADS, 1 + 4 + 10, DIM // HEADS + 1)


def test_the_released_sizes():
    """16 heads, 16 features, a reach of 128 tokens to the left, MLPs of 2 C."""
    block = nn.TaylorWindowBlock(64)
    first, second = block.layers
    assert (first.mixer.num_heads, first.mixer.feature_dim) == (16, 16)
    assert (second.mixer.num_heads, second.mixer.window) == (16, 128)
    shapes = {name: list(t.shape) for name, t in block.layers[0].state_dict().items()}
    assert shapes == {
        "mixer.proj_q.weight": [256, 64],
        "mixer.proj_k.weight": [256, 64],
        "mixer.proj_v.weight": [64, 64],
        "mixer.out_proj.weight": [64, 64],
        "norm1.weight": [64],
        "norm2.weight": [64],
        "mlp.fc1.weight": [256, 64],
        "mlp.fc2.weight": [64, 128],
    }


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nn.TaylorAttention(8, 2, 33), "TaylorAttention: feature_dim: must be 1 to 32; .*"),
        (lambda: nn.WindowAttention(8, 2, -1), r"WindowAttention: window: must be 0 to .*; got -1"),
        (
            lambda: nn.WindowAttention(6, 2),
            "WindowAttention: rotary_base: must be None with an odd head_dim; got 10000",
        ),
        (
            lambda: nn.TaylorWindowBlock(8, 3),
            "TaylorWindowBlock: num_heads: must divide dim, 8; .*",
        ),
        (
            lambda: nn.TaylorWindowBlock(8, 2)(torch.zeros(2, 8)),
            r"TaylorWindowBlock: x: must have shape \[B, N, 8\]; got \[2, 8\]",
        ),
        (
            lambda: nn.TaylorWindowBlock(8, 2)(torch.zeros(2, 3, 8), ()),
            r"TaylorWindowBlock: state: must be a TaylorWindowState; got \[\]",
        ),
        (
            lambda: nn.TaylorAttention(8, 2)(torch.zeros(2, 3, 8), torch.zeros(2, 2, 153, 4)),
            r"TaylorAttention: state: must have sums of shape \[2, 2, 153, 5\]; got .*",
        ),
    ],
)
def test_bad_calls(call, says):
    with pytest.raises(RuntimeError, match=f"^tokenmill.nn.{says}$"):
        call()
