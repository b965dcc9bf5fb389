"""cu_seqlens with wrong values, or that leave tokens without a sequence: CUDA and Triton read none
of them on the host."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of
from torch.utils import deterministic

import tokenmill as tm


def attention(q, k, v, ends, backend, **options):
    results = tm.attention(
        q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, causal=True, backend=backend, **options
    )
    return (results[0], results[1].T) if options.get("return_lse") else (results,)


def linear_attention(q, k, v, ends, backend, gates=None, **options):
    return (
        tm.linear_attention(q, k, v, cu_seqlens=ends, log_decay=gates, backend=backend, **options),
    )


CALLS = {
    "softmax": (attention, {"return_lse": True}, torch.float32),
    "half": (attention, {"return_lse": True}, torch.float16),
    "sigmoid": (attention, {"kind": "sigmoid", "softcap": 4.0}, torch.float32),
    "linear": (linear_attention, {}, torch.float16),
    "gates": (linear_attention, {"feature_map": "elu1", "normalize": True}, torch.float32),
}
# The last case has tokens that several CTAs share.
GAPS = [(40, (3, 20, 20, 33)), (40, (0, 25)), (40, (40, 40)), (300, (5, 20, 40))]
CASES = [
    (backend, call, tokens, ends)
    for backend in backends()
    if backend in ("cuda", "emulated", "triton")
    for call in CALLS
    for tokens, ends in GAPS
    if backend != "triton" or (call == "softmax" and ends == GAPS[0][1])
]
HOSTILE = [
    (0, 39, 0, 40), (9, 4, 30, 0), (0, 40) * 4, (-(2**31), 2**31 - 1), (2**31 - 1, -(2**31)),
    (-(2**31), 5, 5, -3, 2**30),
]  # fmt: skip


def run(call, tokens, ends, backend, *, part=slice(None), nan=None):
    """Results and gradients, with token rows. part: slice of the tokens; nan: tokens filled with
    NaN."""
    function, options, dtype = CALLS[call]
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(tokens, 2, 16, generator=g).to(dtype) for _ in range(2))
    leaves = [q, *(torch.randn(tokens, 1, 16, generator=g).to(dtype) for _ in range(2))]
    if nan is not None:
        for t in leaves:
            t[nan] = torch.nan
    gates = [-torch.rand(tokens, 2, generator=g)] if call == "gates" else []
    device = device_of(backend)
    leaves = [t[part].to(device).requires_grad_() for t in leaves + gates]
    at = torch.tensor(ends, dtype=torch.int32, device=device)
    results = function(*leaves[:3], at, backend, *leaves[3:], **options)
    dout = dout[part].to(device)
    grads = torch.autograd.grad(results[0], leaves, dout, materialize_grads=True)
    return [t.detach().cpu() for t in (*results, *grads)]


@pytest.mark.parametrize(("backend", "call", "tokens", "ends"), CASES)
def test_a_token_without_a_sequence_is_an_empty_row(backend, call, tokens, ends):
    inside = slice(ends[0], ends[-1])
    outside = torch.ones(tokens, dtype=torch.bool)
    outside[inside] = False
    got = run(call, tokens, ends, backend, nan=outside)
    alone = run(call, tokens, tuple(e - ends[0] for e in ends), "reference", part=inside)
    _, options, dtype = CALLS[call]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for i, (a, b) in enumerate(zip(got, alone, strict=True)):
        torch.testing.assert_close(a[inside], b, atol=tolerance, rtol=tolerance)
        nothing = -torch.inf if i == 1 and options.get("return_lse") else 0
        assert (a[outside] == nothing).all(), i


@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cuda", "emulated")])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ends", HOSTILE)
def test_every_element_is_written_whatever_the_values(backend, call, ends, monkeypatch):
    """Unwritten memory holds NaN, and in the second run the previous contents."""
    got = run(call, 40, ends, backend)
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", False)
    again = run(call, 40, ends, backend)
    for a, b in zip(got, again, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)
