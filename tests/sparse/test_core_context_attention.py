"""core_context_attention against the released rule, its limits, and decoding."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import gradients
from conftest import backends, device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm
from tokenmill.sparse import CoreContextState


def inputs(backend, length, heads=4, kv_heads=2, b=1, d=8, dv=12, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, d), (kv_heads, d), (kv_heads, dv))
    tensors = (torch.randn(b, length, *s, generator=g).to(dtype) for s in shapes)
    return [t.to(device_of(backend)).requires_grad_() for t in tensors]


def as_released(q, k, v, group, window, cores="query"):
    """The computation of chenyaofo/CCA-Attention at 052cc8e (codebase/core/cca_attn.py, the mask of
    generate_mask): keys and values are repeated to the query heads before pooling, and query i sees
    floor((i + 1 - window) / group) cores and the tokens after their groups."""
    shared = q.shape[2] // k.shape[2]
    length, scale = q.shape[1], q.shape[3] ** -0.5
    keys, values = (t.repeat_interleave(shared, 2) for t in (k, v))
    weighing = q
    if cores == "kv":
        weighing = q.unflatten(2, (-1, shared)).mean(3).repeat_interleave(shared, 2)
    pooled = [(keys[:, :0], values[:, :0])]
    for at in range(0, length - group + 1, group):
        own = [t[:, at : at + group] for t in (keys, values)]
        a = torch.softmax(scale * (own[0] * weighing[:, at + group - 1, None]).sum(-1), 1)
        pooled.append(tuple((a[..., None] * t).sum(1, keepdim=True) for t in own))
    core_k, core_v = (torch.cat(t, 1) for t in zip(*pooled, strict=True))
    row = torch.arange(length, device=q.device)[:, None]
    seen = ((row + 1 - window) // group).clamp(min=0)
    core, token = (torch.arange(t.shape[1], device=q.device) for t in (core_k, keys))
    visible = torch.cat([core < seen, (token >= seen * group) & (token <= row)], 1)
    z = scale * torch.einsum("bihd,bjhd->bhij", q, torch.cat([core_k, keys], 1))
    z = z.masked_fill(~visible, -torch.inf)
    out = torch.einsum("bhij,bjhd->bihd", z.softmax(-1), torch.cat([core_v, values], 1))
    return out, z.logsumexp(-1)


def close(got, want, tolerance=3e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@each_backend
@examples(5)
@given(
    length=st.integers(1, 36),
    group=st.sampled_from([1, 2, 4, 8, 16]),
    window=st.integers(0, 24),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    cores=st.sampled_from(["query", "kv"]),
    seed=st.integers(0, 2**31),
)
def test_what_the_release_computes(length, group, window, heads, cores, seed, backend):
    leaves = inputs(backend, length, *heads, b=2, seed=seed)
    got = tm.core_context_attention(
        *leaves, cores=cores, window=window, group=group, return_lse=True, backend=backend
    )
    want = as_released(*leaves, group, window, cores)
    close(got, want)
    close(gradients(got, leaves), gradients(want, leaves), 1e-4)


@each_backend
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_the_sizes_of_the_release(heads, backend):
    """Groups of 16: query 46 sees no core, query 47 the first, query 63 the second."""
    leaves = inputs(backend, 70, *heads)
    got = tm.core_context_attention(*leaves, group=16, window=32, backend=backend)
    close([got], as_released(*leaves, 16, 32)[:1])


def test_defaults_are_those_of_the_release():
    q, k, v = (t.detach() for t in inputs("cpu", 1200, 2, 1, d=4, dv=4))
    got = tm.core_context_attention(q, k, v, backend="reference")
    close([got], as_released(q, k, v, 16, 1024)[:1])
    assert (CoreContextState().group, CoreContextState().window) == (16, 1024)


def test_what_a_cache_of_128k_tokens_keeps():
    """93 % less, as the paper counts it: cores (including cores of the window) and tokens."""
    state = CoreContextState(cores="kv")
    state.tokens = 2**17
    kept = state.cores + state.window // state.group + state.raw
    assert kept == 8128 + 64 + 1024 and round(1 - kept / state.tokens, 2) == 0.93


@pytest.mark.parametrize("cores", ["query", "kv"])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2)])
@pytest.mark.parametrize("backend", [b for b in backends() if b == "cpu"])
def test_a_request_has_the_bits_that_it_has_alone(backend, heads, cores):
    """This holds in batches of any size, forward and backward, and in decoding."""
    o = {"cores": cores, "window": 32, "group": 32, "backend": backend}
    many = inputs(backend, 99, *heads, b=5, d=33, dv=20)

    def results(requests):
        leaves = [t.detach()[requests].requires_grad_() for t in many]
        out = tm.core_context_attention(*leaves, return_lse=True, **o)
        state = CoreContextState(**o)
        q, k, v = (t.detach() for t in leaves)
        steps = [state.prefill(q[:, :93], k[:, :93], v[:, :93])]
        steps += [state.step(*(t[:, i : i + 1] for t in (q, k, v))) for i in range(93, 99)]
        loss = out[0].square().sum() + out[1].sin().sum()
        return [*out, *torch.autograd.grad(loss, leaves), *steps]

    whole = results(slice(None))
    for first, last in ((0, 1), (1, 3), (2, 5)):
        for part, all_ in zip(results(slice(first, last)), whole, strict=True):
            assert torch.equal(part, all_[first:last])


@each_backend
@pytest.mark.parametrize("sizes", [(1, 0), (1, 3), (16, 42)])
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
    for length in (1, 38, 39, 40, 41):
        part = tm.core_context_attention(*(t[:, :length] for t in (q, k, v)), **o)
        torch.testing.assert_close(part, whole[:, :length], rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize(
    ("sizes", "start", "cores"),
    [
        ((4, 8), 0, "query"), ((1, 2), 27, "query"), ((4, 4), 23, "kv"), ((8, 11), 21, "query"),
        ((4, 0), 25, "query"), ((16, 3), 15, "kv"),
    ],
)  # fmt: skip
def test_steps_are_the_whole_sequence(backend, sizes, start, cores):
    q, k, v = (t.detach() for t in inputs(backend, 33, b=2))
    o = {"cores": cores, "group": sizes[0], "window": sizes[1], "backend": backend}
    want = tm.core_context_attention(q, k, v, **o)
    state = CoreContextState(**o)
    outs = [state.prefill(q[:, :start], k[:, :start], v[:, :start])] if start else []
    for i in range(start, q.shape[1]):
        outs.append(state.step(*(t[:, i : i + 1] for t in (q, k, v))))
        assert state.raw < sum(sizes)
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
        ({"window": 2**31}, r"window: must be 0 to 2\^31 - 1; got 2147483648"),
        ({"window": -16}, r"window: must be 0 to 2\^31 - 1; got -16"),
        ({"cores": "head"}, "cores: must be 'query' or 'kv'; got 'head'"),
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
