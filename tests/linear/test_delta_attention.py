"""Properties of delta_attention, and what released code computes: the naive recurrences of
fla-org/flash-linear-attention (fla/ops/delta_rule/naive.py, gated_delta_rule/naive.py and
kda/naive.py, main of 2026), and the fallback of transformers for CPUs.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import backends
from each import ints
from hypothesis import given
from hypothesis import strategies as st
from tier import examples
from torch.nn.functional import logsigmoid, normalize

import tokenmill as tm

ABLE = backends("reference")
KINDS = (None, "head", "channel")


def fla_naive(q, k, v, beta, log_decay=None, state=None, *, scale=None):
    """q, k [B, T, Hk, D], v [B, T, H, Dv]: decay, then the correction, then the query."""
    repeat = v.shape[2] // q.shape[2]
    q, k = (t.repeat_interleave(repeat, 2) for t in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if log_decay is None:
        log_decay = torch.zeros_like(beta)
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    h = q.new_zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3]) if state is None else state
    outs = [v[:, :0]]
    for t in range(q.shape[1]):
        h = h * log_decay[:, t].exp()[..., None]
        error = v[:, t] - (h * k[:, t, :, :, None]).sum(-2)
        h = h + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outs.append(((q[:, t] * scale)[..., None] * h).sum(-2)[:, None])
    return torch.cat(outs, 1), h


def draw(*lead, heads=2, key_heads=None, d=3, dv=4, kind="head", states=2, steep=2.0, seed=0):
    """q, k, v, beta, log_decay or None, state, in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    key_heads = key_heads or heads
    q, k, v = normal(*lead, key_heads, d), normal(*lead, key_heads, d), normal(*lead, heads, dv)
    beta = 2 * torch.rand(*lead, heads, generator=g, dtype=torch.float64)
    shape = (*lead, heads, d) if kind == "channel" else (*lead, heads)
    decay = None if kind is None else logsigmoid(normal(*shape) + 3) * steep
    return [q, normalize(k, dim=-1), v, beta, decay, normal(states, heads, d, dv)]


def run(q, k, v, beta, log_decay=None, state=None, **options):
    return tm.delta_attention(
        q, k, v, beta, log_decay=log_decay, initial_state=state, return_final_state=True, **options
    )


def with_gradients(function, given, **options):
    """The results, and the gradients of one combination of them."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in given]
    results = function(*leaves, **options)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in results]
    return *results, *torch.autograd.grad(results, [t for t in leaves if t is not None], weights)


def close(found, wanted, share=2e-5):
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= share * b.abs().max().clamp(min=1e-2) if b.numel() else True


@examples(25)
@given(
    length=st.integers(1, 140), batch=st.integers(1, 2), kind=st.sampled_from(KINDS),
    sizes=st.tuples(st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(1, 40),
                    st.integers(1, 40)),
    steep=st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
)  # fmt: skip
def test_is_the_recurrence_of_released_code(length, batch, kind, sizes, steep):
    (heads, key_heads), d, dv = sizes
    given = draw(
        batch, length, heads=heads, key_heads=key_heads, d=d, dv=dv, kind=kind, states=batch,
        steep=steep,
    )  # fmt: skip
    wanted = with_gradients(fla_naive, given)
    found = with_gradients(run, given)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    narrow = [t if t is None else t.float() for t in given]
    close(with_gradients(run, narrow, backend="cpu"), wanted)


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("value", [-30.0, -torch.inf, 0.0])
def test_gates_at_their_ends(value, kind, backend):
    q, k, v, beta, decay, state = (t.float() for t in draw(1, 70, d=5, kind=kind, states=1))
    decay[:, 3::4] = value
    wanted = with_gradients(fla_naive, [t.double() for t in (q, k, v, beta, decay, state)])
    found = with_gradients(run, (q, k, v, beta, decay, state), backend=backend)
    close([t.nan_to_num() for t in found], [t.nan_to_num() for t in wanted], 5e-5)


@pytest.mark.parametrize("backend", ABLE)
def test_a_forgotten_state_leaves_nothing(backend):
    """-inf: what came before has no part in anything after, in a chunk as between chunks."""
    q, k, v, beta, decay, state = (t.float() for t in draw(1, 100, d=5, kind="head", states=1))
    for cut in (10, 64, 70):
        gate = decay.clone()
        gate[:, cut] = -torch.inf
        whole, after = run(q, k, v, beta, gate, state, backend=backend)
        rest, last = run(*(t[:, cut:] for t in (q, k, v, beta, gate)), backend=backend)
        torch.testing.assert_close(whole[:, cut:], rest, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(after, last, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ABLE)
def test_equal_keys_are_overwritten(backend):
    """With beta 1 and keys of length 1 the state answers a key with its last value."""
    k = normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, 90, 1, 8)
    v = torch.randn(1, 90, 1, 6)
    out = tm.delta_attention(k, k, v, torch.ones(1, 90, 1), scale=1.0, backend=backend)
    torch.testing.assert_close(out, v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_beta_of_0_only_decays(kind):
    q, k, v, beta, decay, state = (
        t if t is None else t.float() for t in draw(1, 80, kind=kind, states=1)
    )
    out, after = run(q, k, v, torch.zeros_like(beta), decay, state)
    gates = torch.zeros_like(beta) if decay is None else decay
    gates = (gates if kind == "channel" else gates[..., None]).cumsum(1)
    left = torch.exp(gates)[..., None] * state[:, None]
    wanted = torch.einsum("bthd,bthde->bthe", q, left) * 3**-0.5
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after, left[:, -1], atol=1e-6, rtol=1e-4)


PACKED = (0, 4, 4, 71, 72)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_apart(kind):
    given = [t if t is None else t.float() for t in draw(72, kind=kind, states=4)]

    def alone(*args):
        *tensors, state = args
        parts = [
            run(*(t if t is None else t[None, a:b] for t in tensors), state[i, None])
            for i, (a, b) in enumerate(pairwise(PACKED))
        ]
        outs, states = zip(*parts, strict=True)
        return torch.cat(outs, 1)[0], torch.cat(states)

    found = with_gradients(run, given, cu_seqlens=ints(*PACKED))
    for a, b in zip(found, with_gradients(alone, given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ABLE)
def test_what_is_not_finite_stays_in_its_sequence_and_after_itself(backend):
    given = [t.float() for t in draw(72, kind="channel", states=4)]
    options = {"cu_seqlens": ints(*PACKED), "backend": backend}
    clean, clean_state = run(*given, **options)
    for t in given[:5]:
        t[50:71] = torch.nan
    out, state = run(*given, **options)
    kept = [i for i in range(72) if not 50 <= i < 71]
    torch.testing.assert_close(out[kept], clean[kept], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state[[0, 1, 3]], clean_state[[0, 1, 3]], atol=1e-6, rtol=1e-5)
    assert out[50:71].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_normalized_inside_as_before(kind):
    q, k, v, beta, decay, state = draw(1, 70, d=6, kind=kind, states=1)

    def before(q, k, *rest):
        q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        return fla_naive(q, k, *rest, scale=0.3)

    given = [q, 3 * k, v, beta, decay, state]
    wanted = with_gradients(before, given)
    narrow = [t if t is None else t.float() for t in given]
    close(with_gradients(run, narrow, qk_l2norm=True, scale=0.3), wanted)


def test_the_bits_do_not_depend_on_threads_batch_or_strides():
    given = [t.float() for t in draw(3, 130, heads=4, key_heads=2, d=20, dv=12, states=3)]
    wanted = with_gradients(run, given)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = with_gradients(run, given)
    finally:
        torch.set_num_threads(threads)
    apart = [torch.empty_strided(t.shape, [2 * s for s in t.stride()]) for t in given]
    for t, source in zip(apart, given, strict=True):
        t.copy_(source)
    for found in (again, with_gradients(run, apart)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    alone = run(*(t[1:2] for t in given))
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, wanted[:2], strict=True))


@pytest.mark.parametrize("kind", [None, "head"])
def test_transformers_fallback(kind):
    """torch_chunk_gated_delta_rule of modeling_qwen3_next.py, which transformers runs on CPUs."""
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, beta, decay, _ = (
        t if t is None else t.float() for t in draw(2, 150, d=16, dv=24, kind=kind)
    )
    gate = torch.zeros_like(beta) if decay is None else decay
    wanted, after = module.torch_chunk_gated_delta_rule(
        q, k, v, g=gate, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    out, state = run(q, k, v, beta, decay, qk_l2norm=True)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(state, after, atol=2e-6, rtol=1e-4)
