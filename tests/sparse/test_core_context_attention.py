"""core_context_attention against a loop over queries, its limits, and decoding."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import gradients
from conftest import backends, device_of
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm
from tokenmill.sparse import CoreContextState

each_backend = pytest.mark.parametrize("backend", backends("reference"))


def inputs(backend, length, heads=4, kv_heads=2, b=1, d=8, dv=12, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, d), (kv_heads, d), (kv_heads, dv))
    tensors = (torch.randn(b, length, *s, generator=g).to(dtype) for s in shapes)
    return [t.to(device_of(backend)).requires_grad_() for t in tensors]


def by_hand(q, k, v, group, window):
    """One query after the other, with the keys that it sees side by side."""
    scale = q.shape[-1] ** -0.5
    outs, lses = [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            shared = q.shape[2] // k.shape[2]
            kv = h // shared
            mean = q[b, :, kv * shared : (kv + 1) * shared].mean(1)
            cores = []
            for at in range(0, q.shape[1] - group + 1, group):
                keys, values = k[b, at : at + group, kv], v[b, at : at + group, kv]
                a = torch.softmax(scale * keys @ mean[at + group - 1], 0)
                cores.append((a @ keys, a @ values))
            for i in range(q.shape[1]):
                first = max(i // group * group - window, 0)
                raw = (t[b, first : i + 1, kv] for t in (k, v))
                seen = [*cores[: first // group], *zip(*raw, strict=True)]
                z = scale * torch.stack([key for key, _ in seen]) @ q[b, i, h]
                outs.append(torch.softmax(z, 0) @ torch.stack([value for _, value in seen]))
                lses.append(z.logsumexp(0))
    out = torch.stack(outs).view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    return out, torch.stack(lses).view(q.shape[0], q.shape[2], q.shape[1])


def close(got, want, tolerance=3e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@each_backend
@examples(5)
@given(
    length=st.integers(1, 36),
    group=st.sampled_from([1, 2, 4, 8, 16]),
    near=st.integers(0, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    seed=st.integers(0, 2**31),
)
def test_a_loop_over_queries(length, group, near, heads, seed, backend):
    leaves = inputs(backend, length, *heads, b=2, seed=seed)
    got = tm.core_context_attention(
        *leaves, group=group, window=near * group, return_lse=True, backend=backend
    )
    want = by_hand(*leaves, group, near * group)
    close(got, want)
    close(gradients(got, leaves), gradients(want, leaves), 1e-4)


@each_backend
@pytest.mark.parametrize("sizes", [(1, 0), (1, 3), (16, 64)])
def test_what_is_causal_attention(backend, sizes):
    """Groups of one token are their own cores; short texts have none."""
    leaves = inputs(backend, 57)
    got = tm.core_context_attention(*leaves, group=sizes[0], window=sizes[1], backend=backend)
    want = tm.attention(*leaves, causal=True, backend="reference")
    close([got, *gradients([got], leaves)], [want, *gradients([want], leaves)])


@each_backend
def test_later_tokens_do_not_matter(backend):
    q, k, v = (t.detach() for t in inputs(backend, 60))
    o = {"group": 8, "window": 16, "backend": backend}
    whole = tm.core_context_attention(q, k, v, **o)
    for length in (1, 37, 40, 41):
        part = tm.core_context_attention(*(t[:, :length] for t in (q, k, v)), **o)
        torch.testing.assert_close(part, whole[:, :length], rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize(
    ("sizes", "start"), [((4, 8), 0), ((8, 0), 1), ((1, 2), 17), ((4, 4), 8), ((8, 8), 21)]
)
def test_steps_are_the_whole_sequence(backend, sizes, start):
    q, k, v = (t.detach() for t in inputs(backend, 33, b=2))
    o = {"group": sizes[0], "window": sizes[1], "backend": backend}
    want = tm.core_context_attention(q, k, v, **o)
    state = CoreContextState(**o)
    outs = [state.prefill(q[:, :start], k[:, :start], v[:, :start])] if start else []
    for i in range(start, q.shape[1]):
        outs.append(state.step(*(t[:, i : i + 1] for t in (q, k, v))))
        assert state.raw <= sum(sizes)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=2e-5, atol=2e-5)
    assert state.tokens == state.raw + sizes[0] * state.cores == 33


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cpu", "cuda")])
def test_16_bits(backend, dtype):
    leaves = inputs(backend, 300, d=32, dv=32, dtype=dtype)
    got = tm.core_context_attention(*leaves, group=16, window=32, backend=backend)
    want = tm.core_context_attention(
        *(t.double() for t in leaves), group=16, window=32, backend="reference"
    )
    error = (got.double() - want).norm() / want.norm()
    assert got.dtype == dtype and error < (4e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"group": 12}, "group: must be a power of two up to 128; got 12"),
        ({"window": 40}, r"window: must be a multiple of group, 16, below 2\^31; got 40"),
        ({"window": -16}, r"window: must be a multiple of group, 16, below 2\^31; got -16"),
        ({"scale": "wide"}, "scale: must be a number; got 'wide'"),
        ({"return_lse": 1}, "return_lse: must be a bool; got 1"),
    ],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(RuntimeError, match=f"tokenmill.core_context_attention: {error}"):
        tm.core_context_attention(*inputs("cpu", 20), **options)


def test_bad_calls_are_refused():
    q, k, v = inputs("cpu", 20)
    with pytest.raises(RuntimeError, match="k: must have the length of q, 20; got 19"):
        tm.core_context_attention(q, k[:, 1:], v[:, 1:])
    state = CoreContextState(group=4, window=4)
    state.step(q[:, :1], k[:, :1], v[:, :1])
    with pytest.raises(RuntimeError, match="state: must be empty; tokens; got 1"):
        state.prefill(q, k, v)
    with pytest.raises(RuntimeError, match="q: must have 1 token; got 2"):
        state.step(q[:, :2], k[:, :2], v[:, :2])
