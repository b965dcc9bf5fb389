"""Attention to parameter tokens against the formulas of TokenFormer, which equal its released code:
Haiyang-W/TokenFormer at 4d56c73, megatron/model/tokenformer.py, nonlinear_norm_func. A token of
zeros divides by zero there."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import Largest, assert_keeps_budget, draw
from tier import examples
from torch.nn.functional import gelu

import tokenmill as tm
from tokenmill import nn

ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def by_hand(x, keys, values, activation="l2_norm_gelu", norm_scale=None, scale=1.0, eps=1e-12):
    """Computes the matrix of all weights."""
    s, n = scale * (x @ keys.T), keys.shape[0]
    if activation == "softmax":
        return (n if norm_scale is None else norm_scale) * s.softmax(-1) @ values
    factor = n**0.5 if norm_scale is None else norm_scale
    if activation == "l2_norm_gelu":
        return gelu(factor * s / s.norm(dim=-1, keepdim=True).clamp(min=eps)) @ values
    g = gelu(s)
    return factor * g / g.norm(dim=-1, keepdim=True).clamp(min=eps) @ values


def inputs(tokens=11, n=6, d1=8, d2=5, dtype=torch.float64):
    return draw("cpu", (2, tokens, d1), (n, d1), (n, d2), dtype=dtype)


@each_activation
@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "norm_scale": 2.5}], ids=["default", "own"])
def test_results_and_gradients(activation, options, monkeypatch):
    module = importlib.import_module("tokenmill.dense.pattention")
    monkeypatch.setattr(module, "CPU_SCORES", 4 * 6)  # several blocks
    x, keys, values = inputs()
    out = tm.pattention(x, keys, values, activation=activation, **options)
    wanted = by_hand(x, keys, values, activation, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    found = torch.autograd.grad(out, (x, keys, values), weight)
    for a, b in zip(found, torch.autograd.grad(wanted, (x, keys, values), weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@each_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_error_budget(activation, dtype):
    def run(*tensors):
        return tm.pattention(*tensors, activation=activation)

    def literal(*tensors):
        return by_hand(*tensors, activation)

    assert_keeps_budget(run, literal, inputs(64, 32, 16, 24, dtype))


@examples(30)
@given(
    tokens=st.integers(0, 5), n=st.integers(1, 6), d1=st.integers(0, 5), d2=st.integers(0, 5),
    activation=st.sampled_from(ACTIVATIONS),
)  # fmt: skip
def test_any_shape(tokens, n, d1, d2, activation):
    x, keys, values = inputs(tokens, n, d1, d2)
    out = tm.pattention(x, keys, values, activation=activation)
    torch.testing.assert_close(out, by_hand(x, keys, values, activation), rtol=1e-12, atol=1e-12)


@each_activation
def test_derivatives_of_both_orders(activation):
    given = inputs(3, 4, 5, 2)

    def run(*tensors):
        return tm.pattention(*tensors, activation=activation)

    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_transforms_and_compilation():
    x, keys, values = (t.detach().float() for t in inputs())
    weight = torch.randn(2, 11, 5)

    def loss(keys):
        return (tm.pattention(x, keys, values) * weight).sum()

    leaf = keys.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(keys), wanted)
    many = torch.func.vmap(lambda k: tm.pattention(x, k, values))(torch.stack([keys, 2 * keys]))
    torch.testing.assert_close(many[1], tm.pattention(x, 2 * keys, values))
    compiled = torch.compile(tm.pattention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, keys, values), tm.pattention(x, keys, values))


def test_tokens_of_zeros_give_zeros_and_finite_gradients():
    x, keys, values = inputs(dtype=torch.float32)
    x = x.detach().clone()
    x[:, 0] = 0
    x.requires_grad_()
    for activation in ACTIVATIONS[:2]:
        out = tm.pattention(x, keys, values, activation=activation)
        assert not out[:, 0].any()
        gradients = torch.autograd.grad(out.sum(), (x, keys, values))
        assert all(g.isfinite().all() for g in gradients) and not gradients[0][:, 0].any()


def test_the_weights_of_all_tokens_are_never_in_memory():
    x, keys, values = (torch.randn(s, requires_grad=True) for s in ((6000, 4), (800, 4), (800, 4)))
    with Largest() as largest:
        tm.pattention(x, keys, values).sum().backward()
    assert 0 < largest.elements <= 2**20 < 6000 * 800


def test_a_layer_grows_without_a_change():
    torch.manual_seed(0)
    layer, x = nn.Pattention(8, 5, num_tokens=6), torch.randn(4, 8)
    before = layer(x)
    layer.append(10)
    assert layer.num_tokens == 16
    torch.testing.assert_close(layer(x), before)
    layer(x).sum().backward()
    assert layer.key_tokens.grad[6:].any()  # appended tokens learn
    with pytest.raises(RuntimeError, match="activation: must be of L2 norm to append tokens"):
        nn.Pattention(8, 5, 6, activation="softmax").append(1)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"key_tokens": torch.zeros(6, 7)}, r"key_tokens: must have shape \[N, 8\]; got \[6, 7\]"),
        ({"key_tokens": torch.zeros(0, 8)}, r"key_tokens: must have shape \[N, 8\]; got \[0, 8\]"),
        ({"value_tokens": torch.zeros(5, 2)}, "value_tokens: must have a row .*, 6; got 5"),
        ({"value_tokens": torch.zeros(6, 2).half()}, "value_tokens: must have the dtype of x.*"),
        ({"activation": "relu"}, "activation: must be .*; got 'relu'"),
        ({"eps": 0.0}, "eps: must be above 0; got 0"),
        ({"norm_scale": float("inf")}, "norm_scale: must be finite in float32; got inf"),
        ({"eps": 1e300}, r"eps: must be finite in float32; got 1e\+300"),
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, "x: must be float16.*; got int32"),
    ],
)
def test_bad_input(edits, says):
    x, keys, values = (t.detach().float() for t in inputs())
    call = {"x": x, "key_tokens": keys, "value_tokens": values, **edits}
    with pytest.raises(RuntimeError, match=f"^tokenmill.pattention: {says}$"):
        tm.pattention(**call)
