"""Gradient of a softmax score_bias, which changes logits but not weights."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from each import each_kernel

import tokenmill as tm
from tokenmill import registry
from tokenmill.registry import Sample
from tokenmill.testing import compare

SPEC = registry.get("attention")
HEADS = 4


def sample(shape=None, packed=False, **options):
    """Queries and keys whose logits far exceed the sinks, which then have little weight."""

    def make(dtype, g):
        def draw(*size, scale=1.0):
            return (scale * torch.randn(size, generator=g)).to(dtype)

        wide = torch.promote_types(dtype, torch.float32)
        lead = (33,) if packed else (2, 20)
        args = (draw(*lead, HEADS, 32, scale=2.0), draw(*lead, 2, 32, scale=2.0))
        kwargs = dict(options, score_bias=draw(*(shape or (HEADS,))).to(wide))
        kwargs["sink"] = draw(HEADS).to(wide)
        if packed:
            ends = torch.tensor([0, 20, 20, 33], dtype=torch.int32)
            kwargs |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        return (*args, draw(*lead, 2, 32)), kwargs

    return Sample("score_bias", make)


CASES = {
    "per head": sample(),
    "per sequence": sample((2, HEADS), causal=True),
    "packed": sample((3, HEADS), packed=True),
    "softcap": sample(softcap=20.0, window=(6, 0)),
}


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradient_of_a_score_bias_beside_a_sink(case, dtype, backend):
    for seed in range(1 if backend == "triton" else 2):
        for found in compare(
            SPEC, CASES[case], backend, dtype, device=device_of(backend), seed=100 * seed
        ):
            assert found.ok, (seed, found)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_without_a_sink_only_lse_sees_it(dtype, backend):
    q, k, v = (torch.randn(1, 40, HEADS, 16).to(dtype).to(device_of(backend)) for _ in range(3))
    score_bias = torch.randn(HEADS, device=q.device, requires_grad=True)
    out, lse = tm.attention(q, k, v, score_bias=score_bias, return_lse=True, backend=backend)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    (grad,) = torch.autograd.grad((out, lse), score_bias, (dout, dlse))
    torch.testing.assert_close(grad, dlse.sum((0, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@each_kernel
def test_a_score_bias_that_is_not_finite(backend, kind, value):
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, n, 2, 16, generator=g) for n in (3, 5, 5)]

    def results(backend):
        bias = torch.tensor([value, 0.5])
        leaves = [t.to(device_of(backend)).requires_grad_() for t in (*drawn, bias)]
        q, k, v, score_bias = leaves
        out = tm.attention(q, k, v, kind=kind, score_bias=score_bias, causal=True, backend=backend)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return [t.detach().cpu() for t in (out, *grads)]

    torch.testing.assert_close(results(backend), results("reference"), equal_nan=True)
