"""MiniMaxLightningAttention against a literal reading of MiniMax-01, section 2, token by token, and
against the layer in transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from literal import assert_reads_as, randomised
from tensors import each_backend, every_backend

import tokenmill as tm
from tokenmill import nn


def lightning(w, x, *, heads, decay):
    """Computes one sequence and one head after the other, token by token."""
    out = []
    for sequence in x:
        rows = F.silu(sequence @ w["qkv_proj.weight"].T).unflatten(1, (heads, 3, -1))
        parts = []
        for h in range(heads):
            state, tokens = 0, []
            for q, k, v in rows[:, h]:
                state = decay[h] * state + k[:, None] * v
                tokens.append(q @ state)
            parts.append(torch.stack(tokens) if tokens else rows[:, h, 0])
        o = torch.cat(parts, 1)
        o = o * (o.square().mean(1, keepdim=True) + 1e-6).rsqrt() * w["norm.weight"]
        gate = torch.sigmoid(sequence @ w["output_gate.weight"].T)
        out.append((gate * o) @ w["out_proj.weight"].T)
    return out


def reading(layer, lengths=None):
    decay = torch.exp(-layer.slopes.cpu().double())

    def literal(w, x, *_):
        sequences = x if lengths is None else x.split(lengths)
        return (torch.stack if lengths is None else torch.cat)(
            lightning(w, sequences, heads=layer.num_heads, decay=decay)
        )

    return literal


@each_backend
@pytest.mark.parametrize(
    ("batch", "tokens", "dim", "heads", "head_dim"),
    [(1, 67, 32, 4, None), (2, 1, 6, 3, 5), (1, 9, 5, 1, 3)],
)
def test_the_equations(batch, tokens, dim, heads, head_dim, backend):
    layer = nn.MiniMaxLightningAttention(
        dim, heads, head_dim, layer=1, num_layers=8, backend=backend
    )
    x = torch.randn(batch, tokens, dim, requires_grad=True)
    assert_reads_as(randomised(layer), reading(layer), x, backend=backend, tolerance=5e-5)


@each_backend
def test_packed_sequences(backend):
    lengths = [4, 0, 1, 9]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    layer = nn.MiniMaxLightningAttention(8, 2, backend=backend)
    x = torch.randn(14, 8, requires_grad=True)
    assert_reads_as(randomised(layer), reading(layer, lengths), x, ends, backend=backend,
                    tolerance=5e-5)  # fmt: skip


@each_backend
def test_prefill_and_decode_continue_in_slots(backend):
    device = device_of(backend)
    layer = nn.MiniMaxLightningAttention(24, 3, layer=0, num_layers=4, backend=backend).to(device)
    x = torch.randn(2, 12, 24, device=device)
    slots = torch.tensor([4, 1], dtype=torch.int32, device=device)
    with torch.no_grad():
        want, state = layer(x), layer.new_state(6)
        state.kv[[0, 2, 3, 5]] = 7.0
        calls = (layer.prefill, layer.prefill, layer.decode, layer.decode)
        steps = zip(calls, x.split([5, 2, 1, 4], 1), strict=True)
        parts = [call(tokens, state, slots) for call, tokens in steps]
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)
        assert (state.kv[[0, 2, 3, 5]] == 7).all()
        skipped = torch.tensor([-1, 1], dtype=torch.int32, device=device)
        before = state.kv.clone()
        assert (layer.decode(x[:, :1], state, skipped)[0] == 0).all()
        assert torch.equal(state.kv[4], before[4]) and not torch.equal(state.kv[1], before[1])
        state.reset(slots)
        again = layer.decode(x[:, :2], state, slots)
        torch.testing.assert_close(again, want[:, :2], rtol=1e-4, atol=1e-5)
        state.reset()
        assert not state.kv.any()
        torch.testing.assert_close(layer.prefill(x, state), want, rtol=1e-4, atol=1e-5)


def test_slopes_stay_float32():
    layer = nn.MiniMaxLightningAttention(8, 2, layer=1, num_layers=3)
    exact = layer.slopes.clone()
    layer.to(torch.bfloat16)
    assert layer.norm.weight.dtype == torch.bfloat16
    assert torch.equal(layer.slopes, exact)
    assert layer(torch.randn(1, 4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    meta = nn.MiniMaxLightningAttention(8, 2).to("meta")
    assert meta.slopes.is_meta and not meta.to_empty(device="cpu").slopes.is_meta


@every_backend
def test_layers_of_transformers_load(backend):
    """Weights have the names of the transformers layer, which agrees in results and gradients."""
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = minimax.MiniMaxConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=4, head_dim=8, block_size=5,
        layer_types=["linear_attention"] * 4, num_key_value_heads=3,
    )  # fmt: skip
    theirs = minimax.MiniMaxLightningAttention(config, layer_idx=2)
    randomised(theirs)
    layer = nn.MiniMaxLightningAttention(24, 3, 8, backend=backend)
    layer.load_state_dict(theirs.state_dict())
    assert torch.equal(layer.slopes, theirs.slope_rate.flatten())
    layer.to(device_of(backend))
    x = torch.randn(2, 13, 24, requires_grad=True)
    want = theirs(x, None, None)[0]
    got = layer(x.to(device_of(backend)))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(want)
    wanted = torch.autograd.grad((want * weight).sum(), [x, theirs.qkv_proj.weight])
    leaves = [x, layer.qkv_proj.weight]
    found = torch.autograd.grad((got * weight.to(got.device)).sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


def test_slopes_load_where_a_model_has_them():
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = minimax.MiniMaxConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=4, head_dim=8,
        layer_types=["linear_attention"] * 4, num_key_value_heads=3,
    )  # fmt: skip
    state = minimax.MiniMaxLightningAttention(config, layer_idx=2).state_dict()
    without = {n: t for n, t in state.items() if n.endswith("weight")}
    other = nn.MiniMaxLightningAttention(24, 3, 8, layer=2, num_layers=4)
    other.load_state_dict(without)
    assert torch.equal(other.slopes, tm.lightning_slopes(3, 2, 4))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: nn.MiniMaxLightningAttention(8, 3), "Attention: num_heads: must divide dim"),
        (lambda: nn.MiniMaxLightningAttention(8, 2, 300), "Attention: head_dim: must be 1 to"),
        (lambda: nn.MiniMaxLightningAttention(8, 2)(torch.zeros(3, 8)),
         r"Attention: x: must have shape \[B, N, 8\]; got \[3, 8\]"),
        (lambda: nn.MiniMaxLightningAttention(8, 2).decode(
            torch.zeros(1, 1, 8), nn.MiniMaxLightningAttention(8, 2).new_state(1)),
         r"Attention: state: requires torch\.no_grad\(\)"),
        (lambda: nn.MiniMaxLightningAttention(8, 2).prefill(
            torch.zeros(1, 1, 8), nn.MiniMaxLightningAttention(8, 4).new_state(1)),
         r"Attention: state: must have shape \[slots, 2, 4, 4\]"),
        (lambda: nn.MiniMaxLightningAttention(8, 2).requires_grad_(False).prefill(
            torch.zeros(1, 1, 8), nn.MiniMaxLightningState(torch.zeros(3, 2, 4, 4)),
            torch.tensor([-1])),
         r"Attention: slots: must not be negative in prefill; got -1"),
        (lambda: nn.MiniMaxLightningState(torch.zeros(1, 2, 3)), "State: kv: must have shape"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.MiniMaxLightning{error}"):
        call()
