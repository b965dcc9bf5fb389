"""linear_attention and linear_attention_decode with a decay per channel: what fla computes,
heads, and gates without measure."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from each import each_backend, each_kernel
from linear_oracle import close, interpreted
from torch.nn.functional import logsigmoid

import tokenmill as tm

INF, NAN = float("inf"), float("nan")


def draw(backend, length=50, heads=2, d=16, dv=24, batch=1, kv_heads=None, steep=0.0, seed=0):
    """q, k, v and log_decay [B, S, H, D]; steep multiplies gates beyond their usual size."""
    g = torch.Generator().manual_seed(seed)
    kv_heads = kv_heads or heads
    shapes = (heads, d), (kv_heads, d), (kv_heads, dv)
    q, k, v = (torch.randn(batch, length, *shape, generator=g) for shape in shapes)
    gates = logsigmoid(torch.randn(batch, length, heads, d, generator=g) + 2)
    if steep:
        gates = -steep * torch.rand(batch, length, heads, d, generator=g)
    return [t.to(device_of(backend)) for t in (q, k, v, gates)]


def naive_recurrent_gla(q, k, v, gk, initial_state=None):
    """naive_recurrent_gla of fla/ops/gla/naive.py (fla-org/flash-linear-attention), in float64:
    out [B, S, H, Dv] and the state after the last token."""
    q, k, v, gk = (t.double().transpose(1, 2) for t in (q, k, v, gk))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    if initial_state is not None:
        state = initial_state.double()
    outs = []
    for t in range(q.shape[2]):
        state = state * gk[:, :, t, :, None].exp() + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, :, None] * q.shape[-1] ** -0.5 * state).sum(-2))
    return torch.stack(outs, 2).transpose(1, 2), state


@each_backend
def test_the_recurrence_of_gla(backend):
    q, k, v, gates = draw(backend, batch=2)
    before = torch.randn(2, 2, 16, 24).to(q.device)
    want, after = naive_recurrent_gla(q, k, v, gates, before)
    out, state = tm.linear_attention(
        q, k, v, log_decay=gates, initial_state=before, return_final_state=True, backend=backend
    )
    close(out, want)
    close(state, after)


@each_kernel
def test_gradients_of_the_recurrence_of_gla(backend):
    tensors = draw(backend, length=37)
    g = torch.Generator().manual_seed(1)
    before = torch.randn(1, 2, 16, 24, generator=g).to(tensors[0].device)
    cotangents = [torch.randn(s, generator=g) for s in ((1, 37, 2, 24), (1, 2, 16, 24))]
    found = []
    for exact in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (*tensors, before)]
        q, k, v, gates, initial = leaves
        if exact:
            results = naive_recurrent_gla(q, k, v, gates, initial)
        else:
            results = tm.linear_attention(
                q, k, v, log_decay=gates, initial_state=initial, return_final_state=True,
                backend=backend,
            )  # fmt: skip
        weights = [c.to(r) for c, r in zip(cotangents, results, strict=True)]
        found.append(torch.autograd.grad(results, leaves, weights))
    for exact, ours in zip(*found, strict=True):
        close(ours, exact)


@each_backend
@pytest.mark.parametrize("log_decay", [0.0, -30.0, -1e4, -INF])
def test_one_decay_in_all_channels_is_a_decay_of_the_token(log_decay, backend):
    q, k, v, gates = draw(backend, length=70)
    g = torch.Generator().manual_seed(3)
    chosen = torch.rand(gates.shape[:-1], generator=g).to(gates.device) < 0.2
    token = torch.where(chosen, torch.tensor(log_decay, device=gates.device), gates[..., 0])
    results = [
        tm.linear_attention(
            q, k, v, log_decay=decay, return_final_state=True, backend=backend
        )
        for decay in (token[..., None].expand(gates.shape), token)
    ]  # fmt: skip
    for ours, of_token in zip(*results, strict=True):
        close(ours, of_token)


@each_backend
@pytest.mark.parametrize("steep", [3.0, 30.0, 300.0])
def test_steep_gates(steep, backend):
    q, k, v, gates = draw(backend, length=67, steep=steep)
    out, state = tm.linear_attention(
        q, k, v, log_decay=gates, return_final_state=True, backend=backend
    )
    want, after = naive_recurrent_gla(q, k, v, gates)
    close(out, want)
    close(state, after)


@each_backend
def test_a_channel_that_forgets_hides_the_past_from_later_tokens(backend):
    q, k, v, gates = draw(backend, length=40)
    gates[:, 20] = -INF
    k[:, 5], v[:, 6] = 1e30, -1e30
    out = tm.linear_attention(q, k, v, log_decay=gates, backend=backend)
    rest = tm.linear_attention(
        q[:, 20:], k[:, 20:], v[:, 20:], log_decay=gates[:, 20:], backend=backend
    )
    close(out[:, 20:], rest)


@each_backend
def test_nan_stays_in_its_head_and_out_of_earlier_tokens(backend):
    q, k, v, gates = draw(backend, length=40)
    clean = tm.linear_attention(q, k, v, log_decay=gates, backend=backend)
    v[:, 21, 1, 3] = NAN
    out = tm.linear_attention(q, k, v, log_decay=gates, backend=backend)
    assert out[:, 21:, 1, 3].isnan().all()
    seen = torch.zeros_like(out, dtype=torch.bool)
    seen[:, 21:, 1] = True
    close(out[~seen], clean[~seen])  # not by tensor cores where a chunk is not finite


@each_backend
def test_heads_of_a_group_share_keys_and_values(backend):
    q, k, v, gates = draw(backend, heads=4, kv_heads=2)
    out = tm.linear_attention(q, k, v, log_decay=gates, backend=backend)
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    assert torch.equal(out, tm.linear_attention(q, k, v, log_decay=gates, backend=backend))


@each_backend
def test_steps_are_the_sequence(backend):
    q, k, v, gates = draw(backend, length=9, heads=4, kv_heads=2, d=20, dv=17)
    want, after = naive_recurrent_gla(q, *(t.repeat_interleave(2, 2) for t in (k, v)), gates)
    states = torch.zeros(3, 4, 20, 17, device=q.device)
    slots = torch.tensor([2], dtype=torch.int32, device=q.device)
    outs = [
        tm.linear_attention_decode(
            *(t[:, part] for t in (q, k, v)), states, log_decay=gates[:, part],
            state_indices=slots, backend=backend,
        )
        for part in (slice(0, 1), slice(1, 6), slice(6, 9))
    ]  # fmt: skip
    close(torch.cat(outs, 1), want)
    close(states[2:], after)
    assert not states[:2].any()


@each_backend
def test_channels_apart_in_memory(backend):
    q, k, v, gates = draw(backend)
    want = tm.linear_attention(q, k, v, log_decay=gates, backend=backend)
    apart = gates.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert apart.stride(-1) != 1
    assert torch.equal(want, tm.linear_attention(q, k, v, log_decay=apart, backend=backend))
    state = torch.zeros(1, 2, 16, 24, device=q.device)
    outs = [
        tm.linear_attention_decode(
            q[:, :2], k[:, :2], v[:, :2], state.clone(), log_decay=x[:, :2], backend=backend
        )
        for x in (gates, apart)
    ]  # fmt: skip
    assert torch.equal(*outs)


@pytest.mark.parametrize("backend", [b for b in backends() if not interpreted(b)])
def test_slow_decays_over_a_long_memory(backend):
    """A bias of 1e-8 of each decay would be seen after 20,000 tokens. Sums of decays of tokens are
    float64, of decays per channel float32."""
    length = 1 << 17
    q, k, v, gates = draw(backend, length=length, heads=1, d=8, dv=8)
    token = gates[..., 0].clamp(min=-1) * 1e-4
    channels = token[..., None].expand(1, length, 1, 8)
    found = [
        tm.linear_attention(
            q, k, v, log_decay=decay, return_final_state=True, backend=backend
        )
        for decay in (channels, token)
    ]  # fmt: skip
    for ours, of_token in zip(*found, strict=True):
        close(ours, of_token, 3e-6)
    state = torch.zeros(1, 1, 8, 8, device=q.device)
    tm.linear_attention_decode(q, k, v, state, log_decay=channels, backend=backend)
    close(state, found[1][1], 1e-5)
