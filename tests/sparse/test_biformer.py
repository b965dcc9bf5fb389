"""BiFormerAttention against literal readings of the published modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import backends, device_of
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenmill as tm
from tokenmill.bench.bilevel_routing_attention import gathered_attention

each_backend = pytest.mark.parametrize("backend", backends("reference"))


def weights(dim, side, g):
    """As the published channels-first module calls them."""
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


def channels_first(x, w, heads, parts, topk, side):
    """x [B, C, Y, X]. Zeros fill up what the 1x1 convolution made."""
    dim, size = x.shape[1], x.shape[2:]
    region = size[0] // parts, size[1] // parts
    q, k, v = F.conv2d(x, w["qkv_linear.weight"], w["qkv_linear.bias"]).chunk(3, 1)
    pool = {"kernel_size": region, "ceil_mode": True, "count_include_pad": False}
    mean_q, mean_k = (F.avg_pool2d(t, **pool).flatten(2) for t in (q, k))
    graph = (mean_q.transpose(1, 2) @ mean_k).topk(topk).indices
    split = [t.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2) for t in (q, k, v)]
    out = gathered_attention(*split, graph, region, dim**-0.5)
    out = out.permute(0, 3, 4, 1, 2).flatten(1, 2)
    out = out + F.conv2d(v, w["lepe.weight"], w["lepe.bias"], padding=side // 2, groups=dim)
    return F.conv2d(out, w["output_linear.weight"], w["output_linear.bias"])


def channels_last(x, w, heads, parts, topk, side):
    """x [B, Y, X, C]. Zeros fill up the input, and regions divide what comes of it."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % parts, 0, -height % parts))
    return channels_first(x.permute(0, 3, 1, 2), w, heads, parts, topk, side).permute(0, 2, 3, 1)[
        :, :height, :width
    ]


@each_backend
@settings(max_examples=5)
@given(
    height=st.integers(3, 15),
    width=st.integers(3, 15),
    topk=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("padding", ["zeros", "input"])
def test_published_modules(height, width, topk, seed, padding, backend):
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
        want = channels_first(x.permute(0, 3, 1, 2), w, 2, 3, topk, 5).permute(0, 2, 3, 1)
    else:
        want = channels_last(x, w, 2, 3, topk, 5)
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


def test_every_region_is_attention():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 14, 21, 32, generator=g)
    layer = tm.nn.BiFormerAttention(32, num_heads=4, topk=None, side_dwconv=0)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 4, -1)).unbind(3)
    want = tm.attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), scale=32**-0.5)
    want = layer.wo(want.flatten(2).view_as(x))
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_heads": 3}, "num_heads: must divide dim, 16; got 3"),
        ({"topk": 50}, r"topk: must be 1 to regions\^2, 49, or None; got 50"),
        ({"side_dwconv": 4}, "side_dwconv: must be odd, or 0; got 4"),
        ({"padding": "reflect"}, "padding: must be 'mask', 'zeros' or 'input'; got 'reflect'"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.BiFormerAttention: {error}"):
        tm.nn.BiFormerAttention(16, **{"num_heads": 2, **options})


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
