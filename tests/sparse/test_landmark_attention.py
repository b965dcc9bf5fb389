"""landmark_attention against explicit weights, its limits and gradients."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import gradients
from conftest import backends
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from landmark_calls import inputs, weights_of
from tier import examples

import tokenmill as tm


def by_hand(q, k, v, block):
    shared = q.shape[2] // k.shape[2]
    out, lse = [], []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                z = q.shape[-1] ** -0.5 * k[b, :, h // shared] @ q[b, i, h]
                w, log_z = weights_of(z, i, block)
                out.append(w @ v[b, :, h // shared])
                lse.append(log_z)
    out = torch.stack(out).view(*q.shape[:3], -1)
    return out, torch.stack(lse).view(q.shape[:3]).transpose(1, 2)


@each_backend
@examples(4)
@given(
    length=st.integers(1, 24),
    block=st.sampled_from([2, 3, 5, 8, 16]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    seed=st.integers(0, 2**31),
)
def test_explicit_weights(length, block, heads, seed, backend):
    leaves = inputs(backend, length, *heads, b=1, seed=seed)
    got = tm.landmark_attention(*leaves, block=block, return_lse=True, backend=backend)
    want = by_hand(*leaves, block)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5)
    pairs = zip(gradients(got, leaves), gradients(want, leaves), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@each_backend
def test_weights_sum_to_one_and_landmarks_have_none(backend):
    q, k, v = (t.detach() for t in inputs(backend, 33))
    ones = tm.landmark_attention(q, k, torch.ones_like(v), block=8, backend=backend)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    v[:, 7::8] = torch.nan  # never read
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = tm.landmark_attention(*leaves, block=8, backend=backend)
    assert out.isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in (dq, dk, dv))
    assert not dv[:, 7::8].any()


@pytest.mark.parametrize("block", [7, 150], ids=["short", "long"])
@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cpu", "cuda")])
def test_any_number_of_threads_gives_the_same_bits(block, backend):
    """The sequence exceeds one part of the keys in the backward."""
    leaves = inputs(backend, 1100, heads=2, kv_heads=1, b=1, d=16, dv=16)
    found = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got = tm.landmark_attention(*leaves, block=block, return_lse=True, backend=backend)
            found.append([*got, *gradients(got, leaves)])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_gradients_keep_grows_with_the_tokens():
    """It does not grow with their square: only out, lse and the inputs are saved."""
    saved = []
    for tokens in (64, 128):
        sizes = []
        leaves = inputs("cpu", tokens)

        def pack(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            tm.landmark_attention(*leaves, block=16)
        saved.append(sum(sizes))
    assert saved[1] == 2 * saved[0]


@each_backend
def test_a_sequence_without_a_landmark_is_causal_attention(backend):
    q, k, v = (t.detach() for t in inputs(backend, 31))
    got = tm.landmark_attention(q, k, v, block=32, return_lse=True, backend=backend)
    want = tm.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    torch.testing.assert_close(got, want)


def test_gradients_are_those_of_differences():
    leaves = [t.detach().double().requires_grad_() for t in inputs("reference", 11, b=1, d=3, dv=2)]

    def run(q, k, v):
        return tm.landmark_attention(q, k, v, block=4, return_lse=True, backend="reference")

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_the_error_budget(dtype, backend):
    q, k, v = (t.detach() for t in inputs(backend, 70, b=1, d=16, dv=16, dtype=dtype))
    out = tm.landmark_attention(q, k, v, block=16, backend=backend)
    wide, plain = (
        tm.landmark_attention(*(t.to(d) for t in (q, k, v)), block=16, backend="reference")
        for d in (torch.float64, dtype)
    )
    tm.testing.assert_accurate(out.cpu(), wide.cpu(), plain.cpu())


def test_empty_dimensions():
    q, k, v = (t.detach() for t in inputs("cpu", 0))
    assert tm.landmark_attention(q, k, v).shape == (2, 0, 4, 12)
    q, k, v = (t.detach() for t in inputs("cpu", 5, b=0))
    assert tm.landmark_attention(q, k, v, block=2).shape == (0, 5, 4, 12)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"block": 1}, r"block: must be 2 to 2\^31 - 1; got 1"),
        ({"block": 2.0}, "block: must be an integer; got 2"),
        ({"k": torch.zeros(2, 8, 2, 8), "v": torch.zeros(2, 8, 2, 8)},
         "k: must have the length of q, 9; got 8"),
        ({"return_lse": 1}, "return_lse: must be a bool; got 1"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(edit, message):
    q, k, v = (t.detach() for t in inputs("cpu", 9))
    with pytest.raises(RuntimeError, match=rf"^tokenmill\.landmark_attention: {message}"):
        tm.landmark_attention(**{"q": q, "k": k, "v": v, **edit})
