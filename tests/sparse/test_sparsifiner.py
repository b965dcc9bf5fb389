"""SparsifinerAttention against a literal reading: dense attention behind a mask."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backends, device_of
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm


def masked_attention(x, w, heads, keep_rate, coefficients):
    """x [B, N, C]. Of equal estimates the first: their order is that of a stable sort."""
    batch, tokens, channels = x.shape
    qkv = x @ w["qkv.weight"].T + w["qkv.bias"]
    q, k, v = qkv.view(batch, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    low_q, low_k = (
        t @ w[f"mask_predictor.proj_c_{n}.weight"].T + w[f"mask_predictor.proj_c_{n}.bias"]
        for n, t in (("q", q), ("k", k))
    )
    cheap = low_q @ (low_k.transpose(2, 3) @ w["mask_predictor.proj_n"]) * heads**-0.5
    mixture = cheap[:, :, 1:].softmax(-1)
    if coefficients < mixture.shape[-1]:
        smallest = mixture.topk(coefficients).values[..., -1:]
        mixture = torch.where(mixture >= smallest, mixture, 0)
    basis = w["mask_predictor.proj_back_n"].T.abs()
    estimate = mixture @ torch.where(basis > 0.02, basis, 0)
    order = estimate.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(estimate, dtype=torch.bool)
    mask.scatter_(-1, order[..., : math.ceil(keep_rate * tokens)], True)
    mask = torch.cat([torch.ones_like(mask[:, :, :1]), mask], 2)
    z = (q @ k.transpose(2, 3) * (channels // heads) ** -0.5).masked_fill(~mask, -torch.inf)
    out = (z.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out @ w["proj.weight"].T + w["proj.bias"]


calls = given(
    tokens=st.integers(16, 40),
    keep_rate=st.sampled_from([0.1, 0.25, 1.0]),
    coefficients=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "triton"])
@examples(12)
@calls
def test_dense_attention_behind_a_mask(tokens, keep_rate, coefficients, seed, backend):
    check_layer(tokens, keep_rate, coefficients, seed, backend)


@pytest.mark.parametrize("backend", [b for b in backends() if b == "triton"])
@examples(2)
@calls
def test_dense_attention_behind_a_mask_on_triton(tokens, keep_rate, coefficients, seed, backend):
    check_layer(tokens, keep_rate, coefficients, seed, backend)


def check_layer(tokens, keep_rate, coefficients, seed, backend):
    g = torch.Generator().manual_seed(seed)
    layer = tm.nn.SparsifinerAttention(
        32, tokens, 2, keep_rate=keep_rate, coefficients=coefficients, backend=backend
    ).to(device_of(backend))
    with torch.no_grad():  # the threshold leaves half of the patterns: many estimates are 0
        for name, weight in layer.named_parameters():
            scale = 0.03 if "back" in name else 0.2
            weight.copy_(scale * torch.randn(weight.shape, generator=g))
    x = torch.randn(2, tokens, 32, generator=g).to(device_of(backend)).requires_grad_()
    want = masked_attention(x, dict(layer.state_dict()), 2, keep_rate, coefficients)
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    cotangent = torch.randn(want.shape, generator=g).to(x)
    grads = [torch.autograd.grad(y, x, cotangent)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_the_estimate_learns_the_attention():
    torch.manual_seed(0)
    layer = tm.nn.SparsifinerAttention(16, 24, 1, reduce_tokens=2)
    x = torch.randn(4, 24, 16)
    parameters = list(layer.mask_predictor.parameters())
    optimizer = torch.optim.Adam(parameters, 0.02)
    losses = []
    for _ in range(80):
        estimate, attention = layer.approximate(x)
        loss = (estimate - attention.detach()).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_heads": 3}, "num_heads: must divide dim, 16; got 3"),
        ({"keep_rate": 0.0}, "keep_rate: must be above 0 and at most 1; got 0"),
        ({"reduce_tokens": 50}, "reduce_tokens: must be 1 to num_tokens, 20; got 50"),
        ({"reduce_channels": 9}, "reduce_channels: must be 1 to the dimension of a head, 8; got 9"),
        ({"coefficients": 0}, "coefficients: must be at least 1, or None; got 0"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.SparsifinerAttention: {error}"):
        tm.nn.SparsifinerAttention(16, 20, **{"num_heads": 2, **options})


def test_other_lengths_are_refused():
    layer = tm.nn.SparsifinerAttention(16, 20, 2)
    with pytest.raises(RuntimeError, match=r"x: must have shape \[B, 20, 16\]; got \[1, 21, 16\]"):
        layer(torch.zeros(1, 21, 16))
