"""linear_attention and linear_attention_decode with a bonus: RWKV-6 as fla computes it."""

from __future__ import annotations

import pytest
import torch
from conftest import backends
from each import each_backend, each_kernel, ints, randn
from linear_oracle import close
from torch.nn.functional import logsigmoid

import tokenmill as tm
from tokenmill.linear import _bonus

HEADS, D, DV = 2, 16, 24
each_decay = pytest.mark.parametrize("decay", [None, "head", "token", "channel"])


def naive_recurrent_rwkv6(r, k, v, w, u, initial_state):
    """naive_recurrent_rwkv6 of fla/ops/rwkv6/recurrent_naive.py (fla-org/flash-linear-attention),
    in float64: a token is read before the state decays and takes it, with weight u on the token
    itself. Its decays are per channel.
    """
    r, k, v, w = (t.double().transpose(1, 2) for t in (r, k, v, w))
    state, outs = initial_state.double(), []
    for t in range(r.shape[2]):
        pair = k[:, :, t, :, None] * v[:, :, t, None]
        read = state + u.double()[None, :, :, None] * pair
        outs.append((r[:, :, t, :, None] * r.shape[-1] ** -0.5 * read).sum(-2))
        state = state * w[:, :, t, :, None].exp() + pair
    return torch.stack(outs, 2).transpose(1, 2), state


def draw(backend, length=33, decay="channel", batch=1, kv_heads=HEADS):
    """q, k, v, log_decay, the bonus and a state."""
    q, k, v = (
        randn(batch, length, *shape, backend=backend)
        for shape in ((HEADS, D), (kv_heads, D), (kv_heads, DV))
    )
    shape = {"head": (HEADS,), "token": (batch, length, HEADS), "channel": q.shape}.get(decay)
    gate = None if shape is None else logsigmoid(randn(*shape, backend=backend) + 2)
    bonus, state = randn(HEADS, D, backend=backend), randn(batch, HEADS, D, DV, backend=backend)
    return q, k, v, gate, bonus, state


def exact(q, k, v, gate, bonus, state):
    k, v = (t.repeat_interleave(HEADS // t.shape[2], 2) for t in (k, v))
    if gate is None:
        gate = torch.zeros_like(q)
    elif gate.dim() < 4:
        gate = gate.expand(q.shape[:-1])[..., None].expand(q.shape)
    return naive_recurrent_rwkv6(q, k, v, gate, bonus, state)


@each_backend
@each_decay
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_recurrence_of_rwkv6(kv_heads, decay, backend):
    q, k, v, gate, bonus, state = draw(backend, 33, decay, 2, kv_heads)
    want, after = exact(q, k, v, gate, bonus, state)
    options = {"log_decay": gate, "bonus": bonus, "backend": backend}
    out, found = tm.linear_attention(
        q, k, v, **options, initial_state=state, return_final_state=True
    )
    close(out, want)
    close(found, after)
    zero = torch.zeros_like(state)
    want, _ = exact(q, k, v, gate, bonus, zero)
    close(tm.linear_attention(q, k, v, **options), want)
    if decay == "channel":
        apart = gate.transpose(-1, -2).contiguous().transpose(-1, -2)
        across = q.transpose(-1, -2).contiguous().transpose(-1, -2)
        options["log_decay"] = apart
        close(tm.linear_attention(across, k, v, **options), want)


@each_backend
@each_decay
def test_packed_sequences_are_as_alone(decay, backend):
    lengths = (5, 0, 17, 1, 0)
    q, k, v, gate, bonus, _ = draw(backend, sum(lengths), decay)
    state = randn(len(lengths), HEADS, D, DV, backend=backend)
    ends = ints(0, *torch.tensor(lengths).cumsum(0).tolist(), backend=backend)
    own = gate if gate is None or gate.dim() == 1 else gate[0]
    out, after = tm.linear_attention(
        q[0], k[0], v[0], log_decay=own, bonus=bonus, initial_state=state,
        return_final_state=True, cu_seqlens=ends, backend=backend,
    )  # fmt: skip
    for n, (start, end) in enumerate(zip(ends.tolist()[:-1], ends.tolist()[1:], strict=True)):
        part = [t[:, start:end] for t in (q, k, v)]
        one = gate if gate is None or gate.dim() == 1 else gate[:, start:end]
        if end == start:
            assert torch.equal(after[n], state[n])
            continue
        want, last = exact(*part, one, bonus, state[n : n + 1])
        close(out[None, start:end], want)
        close(after[n : n + 1], last)


@each_backend
@pytest.mark.parametrize("ends", [(0,), (0, 0), (0, 0, 0)], ids=str)
def test_nothing_at_all(ends, backend):
    q, k, v, gate, bonus, _ = draw(backend, 0)
    out, state = tm.linear_attention(
        q[0], k[0], v[0], log_decay=gate[0], bonus=bonus, return_final_state=True,
        cu_seqlens=ints(*ends, backend=backend), backend=backend,
    )  # fmt: skip
    assert out.shape == (0, HEADS, DV) and not state.any() and len(state) == len(ends) - 1
    out = tm.linear_attention(q, k, v, log_decay=gate, bonus=bonus, backend=backend)
    assert out.shape == (1, 0, HEADS, DV)


@each_kernel
@each_decay
def test_gradients(decay, backend):
    tensors = draw(backend, 21, decay)
    named = [t for t in tensors if t is not None]
    cotangents = randn(1, 21, HEADS, DV, backend=backend), randn(1, HEADS, D, DV, backend=backend)
    found = []
    for ours in (False, True):
        leaves = iter([t.detach().clone().requires_grad_() for t in named])
        q, k, v, gate, bonus, state = given = [None if t is None else next(leaves) for t in tensors]
        if ours:
            results = tm.linear_attention(
                q, k, v, log_decay=gate, bonus=bonus, initial_state=state, return_final_state=True,
                backend=backend,
            )  # fmt: skip
        else:
            results = exact(*given)
        weights = [c.to(r) for c, r in zip(cotangents, results, strict=True)]
        wanted = [t for t in given if t is not None]
        found.append(torch.autograd.grad(results, wanted, weights))
    for want, grad in zip(*found, strict=True):
        close(grad, want)


@each_backend
@each_decay
def test_steps_are_the_sequence(decay, backend):
    q, k, v, gate, bonus, _ = draw(backend, 9, decay, kv_heads=1)
    states = torch.zeros(3, HEADS, D, DV, device=q.device)
    want, after = exact(q, k, v, gate, bonus, states[:1])
    slots, whole = ints(2, backend=backend), gate is None or gate.dim() == 1
    outs = []
    for part in (slice(0, 1), slice(1, 6), slice(6, 9)):
        token = [t[:, part] for t in (q, k, v)]
        options = {
            "log_decay": gate if whole else gate[:, part],
            "bonus": bonus,
            "state_indices": slots,
            "backend": backend,
        }
        before = states.clone()
        draft = tm.linear_attention_decode(
            *token, states, **options, accepted=ints(0, backend=backend)
        )
        assert torch.equal(states, before)
        outs.append(tm.linear_attention_decode(*token, states, **options))
        close(draft, outs[-1])
    close(torch.cat(outs, 1), want)
    close(states[2:], after)
    assert not states[:2].any()


@each_backend
def test_a_skipped_request_is_0(backend):
    q, k, v, gate, bonus, states = draw(backend, 2, batch=2)
    before, slots = states.clone(), ints(-1, 1, backend=backend)
    out = tm.linear_attention_decode(
        q, k, v, states, log_decay=gate, bonus=bonus, state_indices=slots, backend=backend
    )
    assert not out[0].any() and out[1].any()
    assert torch.equal(states[0], before[0]) and not torch.equal(states[1], before[1])


def test_a_compiled_call_has_its_bits():
    q, k, v, gate, bonus, state = draw("cpu", 9)

    def call(*tensors):
        q, k, v, gate, bonus, state = tensors
        return tm.linear_attention(q, k, v, log_decay=gate, bonus=bonus, initial_state=state)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    tensors = q, k, v, gate, bonus, state
    assert torch.equal(compiled(*tensors), call(*tensors))
    stacked = [torch.stack([t, 0.5 * t]) for t in tensors]
    found = torch.func.vmap(call)(*stacked)
    for i in range(2):
        torch.testing.assert_close(found[i], call(*(t[i] for t in stacked)))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"bonus": 1.0}, "bonus: must be a tensor"),
        ({"bonus": torch.ones(16)}, r"bonus: must have shape \[2, 16\]; got \[16\]"),
        ({"bonus": torch.ones(2, 16).int()}, "bonus: must be floating-point; got int32"),
        ({"feature_map": "silu"}, "feature_map: must be 'identity' with a bonus; got 'silu'"),
        ({"feature_map": "elu1"}, "feature_map: must be 'identity' with a bonus; got 'elu1'"),
        ({"normalize": True}, "normalize: must be False with a bonus; got True"),
        ({"log_decay": torch.zeros(1, 9, 1)}, r"log_decay: must have shape \[2\], \[1, 9, 2\] or"),
        ({"log_decay": torch.ones(2)}, "log_decay: must not be positive"),
        ({"v": torch.ones(1, 8, 2, 24)}, r"v: must have the shape of k up to the head dimension"),
    ],
)
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("backend", [b for b in backends("reference") if b in ("cpu", "reference")])
def test_errors_are_of_the_call_as_it_was_made(backend, step, change, error):
    q, k, v, gate, bonus, state = draw("cpu", 9, "token")
    given = {"q": q, "k": k, "v": v, "log_decay": gate, "bonus": bonus, **change}
    function = tm.linear_attention
    if step:
        function, given["state"] = tm.linear_attention_decode, state
    with pytest.raises(RuntimeError, match=error):
        function(**given, backend=backend)


def test_values_and_out_are_refused_beforehand():
    q, k, v, gate, bonus, _ = (None if t is None else t[0] for t in draw("cpu", 9, "token"))
    bonus = randn(HEADS, D)
    with pytest.raises(
        RuntimeError, match="cu_seqlens: must end at the number of tokens, 9; got 8"
    ):
        tm.linear_attention(q, k, v, log_decay=gate, bonus=bonus, cu_seqlens=ints(0, 8))
    with pytest.raises(RuntimeError, match="out: must be None with a bonus"):
        tm.linear_attention(q[None], k[None], v[None], bonus=bonus, out=torch.empty(1, 9, 2, 24))


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
@pytest.mark.parametrize("ends", [(3, 5, 9), (0, 4), (7, 2, 40), (-5, 3, 5)], ids=str)
def test_offsets_that_gpus_do_not_check(ends, backend, monkeypatch):
    monkeypatch.setattr(_bonus, "reads_values", lambda t: False)
    q, k, v, gate, bonus, _ = draw(backend, 9)
    out = tm.linear_attention(
        q[0], k[0], v[0], log_decay=gate[0], bonus=bonus, backend=backend,
        cu_seqlens=ints(*ends, backend=backend),
    )  # fmt: skip
    assert out.shape == (9, HEADS, DV) and out.isfinite().all()


def test_explain_names_the_kernel():
    q, k, v, gate, bonus, _ = draw("cpu", 9)
    found = tm.explain(tm.linear_attention, q, k, v, log_decay=gate, bonus=bonus)
    assert found.backend == "cpu"
