"""BiFormerAttention and AttentionLePE against literal readings of the published modules."""

from __future__ import annotations

import pytest
import torch
from biformer_oracle import last_stage, routed_channels_first, routed_channels_last
from conftest import device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm


def weights(dim, side, g):
    """Weights under the names of the published channels-first module."""
    shapes = {
        "qkv_linear.weight": (3 * dim, dim, 1, 1),
        "qkv_linear.bias": (3 * dim,),
        "lepe.weight": (dim, 1, side, side),
        "lepe.bias": (dim,),
        "output_linear.weight": (dim, dim, 1, 1),
        "output_linear.bias": (dim,),
    }
    return {
        name: torch.randn(shape, generator=g) / (dim**0.5 if len(shape) > 1 else 1)
        for name, shape in shapes.items()
    }


@each_backend
@examples(2)
@given(
    height=st.integers(1, 15),
    width=st.integers(1, 15),
    topk=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("padding", ["zeros", "input"])
def test_published_modules(height, width, topk, seed, padding, backend):
    if padding == "zeros":
        height, width = max(height, 3), max(width, 3)
    g = torch.Generator().manual_seed(seed)
    device = device_of(backend)
    w = {name: t.to(device) for name, t in weights(16, 5, g).items()}
    layer = tm.nn.BiFormerAttention(
        16, num_heads=2, regions=3, topk=topk, side_dwconv=5, padding=padding, backend=backend
    )
    layer.load_state_dict(w)
    layer.to(device)
    x = torch.randn(2, height, width, 16, generator=g).to(device).requires_grad_()
    got = layer(x)
    if padding == "zeros":
        want = routed_channels_first(x.permute(0, 3, 1, 2), w, 2, 3, topk).permute(0, 2, 3, 1)
    else:
        want = routed_channels_last(x, w, 2, 3, topk)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    cotangent = torch.randn(want.shape, generator=g).to(device)
    grads = [torch.autograd.grad(y, x, cotangent)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=5e-5)


def test_published_names_load():
    g = torch.Generator().manual_seed(0)
    w = weights(16, 3, g)
    others = {
        "qkv.qkv.weight": w["qkv_linear.weight"].flatten(1),
        "qkv.qkv.bias": w["qkv_linear.bias"],
        "lepe.weight": w["lepe.weight"],
        "lepe.bias": w["lepe.bias"],
        "wo.weight": w["output_linear.weight"].flatten(1),
        "wo.bias": w["output_linear.bias"],
    }
    layers = []
    for state in (w, others, None):
        layer = tm.nn.BiFormerAttention(16, num_heads=2)
        layer.load_state_dict(state or layers[0].state_dict())
        layers.append(layer)
    x = torch.randn(1, 14, 15, 16, generator=g)
    first = layers[0](x)
    assert all(torch.equal(layer(x), first) for layer in layers)
    nested = torch.nn.Sequential(tm.nn.BiFormerAttention(16, num_heads=2))
    nested.load_state_dict({f"0.{name}": t for name, t in w.items()})
    assert torch.equal(nested(x), first)


def test_all_regions_are_attention():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 14, 21, 32, generator=g)
    layer = tm.nn.BiFormerAttention(32, num_heads=4, topk=49, side_dwconv=0)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 4, -1)).unbind(3)
    want = tm.attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), scale=32**-0.5)
    want = layer.wo(want.flatten(2).view_as(x))
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


@each_backend
@pytest.mark.parametrize("local", ["input", "values"])
def test_last_stage(local, backend):
    """Published names load strictly, in either layout."""
    g = torch.Generator().manual_seed(0)
    ones = (1, 1) if local == "values" else ()
    shapes = {
        "qkv.weight": (48, 16, *ones),
        "lepe.weight": (16, 1, 5, 5),
        "lepe.bias": (16,),
        "proj.weight": (16, 16, *ones),
        "proj.bias": (16,),
    }
    device = device_of(backend)
    w = {n: torch.randn(shape, generator=g).to(device) / 4 for n, shape in shapes.items()}
    layer = tm.nn.AttentionLePE(16, local=local, backend=backend).to(device)
    layer.load_state_dict(w)
    x = torch.randn(2, 5, 7, 16, generator=g).to(device).requires_grad_()
    got, want = layer(x), last_stage(x, w, 8, local)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    cotangent = torch.randn(want.shape, generator=g).to(device)
    grads = [torch.autograd.grad(y, x, cotangent)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=5e-5)
    layer.load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_heads": 3}, "num_heads: must divide dim, 16; got 3"),
        ({"topk": 50}, r"topk: must be 1 to regions\^2, 49; got 50"),
        ({"topk": None}, "topk: must be an integer; got None"),
        ({"side_dwconv": 4}, "side_dwconv: must be odd, or 0; got 4"),
        ({"padding": "reflect"}, "padding: must be 'mask', 'zeros' or 'input'; got 'reflect'"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.BiFormerAttention: {error}"):
        tm.nn.BiFormerAttention(16, **{"num_heads": 2, **options})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_heads": 3}, "num_heads: must divide dim, 16; got 3"),
        ({"side_dwconv": 4}, "side_dwconv: must be odd, or 0; got 4"),
        ({"local": "keys"}, "local: must be 'input' or 'values'; got 'keys'"),
        ({}, r"x: must have shape \[B, Y, X, 16\]; got \[1, 8, 8, 15\]"),
    ],
)
def test_bad_calls_of_the_last_stage_are_refused(options, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.AttentionLePE: {error}"):
        tm.nn.AttentionLePE(16, **options)(torch.zeros(1, 8, 8, 15))


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((1, 8, 8, 15), r"x: must have shape \[B, Y, X, 16\]; got \[1, 8, 8, 15\]"),
        (
            (1, 8, 6, 16),
            r"x: must have at least 7 pixels a side, one for each region; got \[8, 6\]",
        ),
    ],
)
def test_bad_maps_are_refused(shape, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.BiFormerAttention: {error}"):
        tm.nn.BiFormerAttention(16, num_heads=2)(torch.zeros(shape))
