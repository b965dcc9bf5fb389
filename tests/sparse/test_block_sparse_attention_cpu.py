"""block_sparse_attention on CPUs: work partition, vectors of packed keys, instruction sets."""

from __future__ import annotations

import pytest
import torch
from conftest import backends

import tokenmill as tm
from tokenmill.sparse.block_sparse_attention_cases import block_sparse_call

pytestmark = pytest.mark.skipif("cpu" not in backends(), reason="of the CPU backend")

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_isa = pytest.mark.parametrize("isa", tm.testing.cpu_isas(), indirect=True)


def results_and_gradients(args, kwargs):
    leaves = [t.detach().requires_grad_() for t in args[:3]]
    out, lse = tm.block_sparse_attention(*leaves, *args[3:], **kwargs, backend="cpu")
    seen = torch.where(lse.isfinite(), lse, 0.0)
    loss = (out.float() * out.detach().float()).sum() + (seen * seen.detach()).sum()
    return out, lse, *torch.autograd.grad(loss, leaves)


@each_dtype
@each_isa
@pytest.mark.parametrize(
    ("heads", "kv_heads", "lists", "block_q"),
    [(1, 1, 1, 64), (2, 1, 2, 32), (6, 2, 2, 16), (6, 2, 6, 128), (4, 1, 1, 4)],
)
def test_shares_of_work_have_the_same_bits(heads, kv_heads, lists, block_q, dtype, isa, threads):
    """With fewer KV heads than threads, threads share the tiles of a head, and its keys in the
    backward."""
    args, kwargs = block_sparse_call(
        sq=300, sk=1500, b=1, h=heads, hk=kv_heads, d=48, dv=72, lists=lists, entries=100,
        block_q=block_q, block_k=8, causal=True, num_sink=21, num_recent=50,
    )(dtype, torch.Generator().manual_seed(0))  # fmt: skip
    threads(1)
    want = results_and_gradients(args, kwargs)
    for n in (2, 3, 8):
        threads(n)
        for a, b in zip(results_and_gradients(args, kwargs), want, strict=True):
            assert torch.equal(a, b)


@each_dtype
@each_isa
@pytest.mark.parametrize("block_k", [1, 2, 16, 64])
def test_a_key_stays_with_the_rows_that_list_it(block_k, dtype, isa):
    """Tiles share packed vectors of keys, some of which they see only in part."""
    args, kwargs = block_sparse_call(
        sq=64, sk=256, b=1, lists=1, entries=0, block_q=16, block_k=block_k, causal=True,
        num_sink=7, num_recent=11,
    )(dtype, torch.Generator().manual_seed(0))  # fmt: skip
    q, k, v = args[:3]
    ids = torch.arange(4, dtype=torch.int32) * (64 // block_k)
    indices, counts = ids.view(1, 1, 4, 1), torch.ones(1, 1, 4, dtype=torch.int32)
    want = results_and_gradients((q, k, v, indices, counts), kwargs)
    spoiled = [t.clone() for t in (k, v)]
    for t in spoiled:
        t[:, 64 * 2 + block_k // 2] = float("nan")  # in row 2 only
    got = results_and_gradients((q, *spoiled, indices, counts), kwargs)
    there = torch.arange(64) // 16 != 2
    assert torch.isnan(got[0][:, 32:48]).all()
    assert torch.equal(got[0][:, there], want[0][:, there])
    assert torch.equal(got[1][:, :, there], want[1][:, :, there])
    assert torch.equal(got[2][:, there], want[2][:, there])


@each_dtype
def test_a_call_agrees_with_its_heads_alone(dtype):
    """Rows of the heads of a GQA group share tiles."""
    args, kwargs = block_sparse_call(
        sq=90, sk=300, b=1, h=10, hk=2, d=64, dv=64, lists=2, entries=20, block_q=64, block_k=4
    )(dtype, torch.Generator().manual_seed(0))
    q, k, v, indices, counts = args
    out, lse = tm.block_sparse_attention(*args, **kwargs, backend="cpu")
    for h in range(10):
        at = slice(h // 5, h // 5 + 1)
        one = (q[:, :, h : h + 1], k[:, :, at], v[:, :, at], indices[:, at], counts[:, at])
        alone = tm.block_sparse_attention(*one, **kwargs, backend="cpu")
        assert torch.equal(alone[0][:, :, 0], out[:, :, h])
        assert torch.equal(alone[1][:, 0], lse[:, h])
