"""moba_attention against a transcription of its formulas, one query and head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backends, device_of

import tokenmill as tm
from tokenmill.sparse import query_lists

# The kernels have their own tests: other backends run one case.
CASES = [(13, 13, (4, 2), 4, 2), (5, 19, (3, 1), 8, 2), (9, 7, (2, 2), 2, 1)]
RUNS = [(b, case) for b in backends("reference") for case in CASES if b == "cpu" or case[0] == 13]


def inputs(backend, queries, keys, heads=4, kv_heads=2, b=1, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((queries, heads, 8), (keys, kv_heads, 8), (keys, kv_heads, 12))
    tensors = (torch.randn(b, *s, generator=g).to(dtype) for s in shapes)
    return [t.to(device_of(backend)).requires_grad_() for t in tensors]


def by_hand(q, k, v, block, topk, lengths=None):
    outs, lses = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), []
    for b, i, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        n = k.shape[1] if lengths is None else lengths[b]
        t, kv = n - q.shape[1] + i, h // (q.shape[2] // k.shape[2])
        if t < 0:
            lses.append(torch.tensor(-math.inf, dtype=q.dtype))
            continue
        own = t // block
        gate = [q[b, i, h] @ k[b, c * block : (c + 1) * block, kv].mean(0) for c in range(own)]
        gate = [(-x.item(), c) for c, x in enumerate(gate)] + [(-math.inf, own)]
        chosen = {c for _, c in sorted(gate)[:topk]}
        seen = [j for j in range(t + 1) if j // block in chosen]
        z = k[b, seen, kv] @ q[b, i, h] * 8**-0.5
        outs[b, i, h] = torch.softmax(z, 0) @ v[b, seen, kv]
        lses.append(z.logsumexp(0))
    return outs, torch.stack(lses).view(q.shape[:3]).transpose(1, 2)


@pytest.mark.parametrize(("backend", "case"), RUNS)
def test_formulas_forward_and_backward(backend, case):
    queries, keys, heads, block, topk = case
    leaves = inputs(backend, queries, keys, *heads)
    out, lse = tm.moba_attention(*leaves, block=block, topk=topk, return_lse=True, backend=backend)
    exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
    want, want_lse = by_hand(*exact, block, topk)
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-5, atol=1e-5)
    dout = torch.randn(want.shape, dtype=torch.float64)
    want.backward(dout)
    out.backward(dout.to(out))
    for leaf, its in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.cpu().double(), its.grad, rtol=1e-4, atol=1e-5)


def test_stripes_change_no_choice(monkeypatch):
    """Stripes of scores depend on the batch. Scores of few queries have other bits than those of
    many, which shows in the choice among blocks whose mean keys are permutations of one."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 193, 2, 1, generator=g).expand(-1, -1, -1, 32).contiguous()
    key, v = torch.randn(32, generator=g), torch.randn(1, 193, 1, 8, generator=g)
    blocks = torch.stack([key[torch.randperm(32, generator=g)] for _ in range(13)])
    k = blocks.repeat_interleave(16, 0)[None, :193, None]
    whole = tm.moba_attention(q, k, v, block=16, topk=3)
    monkeypatch.setattr(query_lists, "CPU_ELEMENTS", 1)
    assert torch.equal(tm.moba_attention(q, k, v, block=16, topk=3), whole)
    monkeypatch.setattr(query_lists, "MIN_ROWS", 1)  # what the rule prevents
    assert not torch.equal(tm.moba_attention(q, k, v, block=16, topk=3), whole)


def test_blocks_of_several_parts_and_requests_of_their_own_lengths(monkeypatch):
    monkeypatch.setattr(query_lists, "CPU_ELEMENTS", 64)  # several stripes
    lengths = torch.tensor([560, 2, 0], dtype=torch.int32)
    q, k, v = (t.detach() for t in inputs("cpu", 40, 560, 2, 1, b=3))
    k[1, 2:], v[0, 560:] = torch.nan, torch.nan
    out, lse = tm.moba_attention(
        q, k, v, block=256, topk=2, seqlens_k=lengths, return_lse=True
    )  # fmt: skip
    exact = (t.double() for t in (q, k, v))
    want, want_lse = by_hand(*exact, 256, 2, lengths.tolist())
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    for length in (560, 300):
        part = tm.moba_attention(q[:1], k[:1, :length], v[:1, :length], block=2**40, topk=9)
        full = tm.attention(q[:1], k[:1, :length], v[:1, :length], causal=True)
        torch.testing.assert_close(part, full)


def test_ties_go_to_the_earlier_block_and_nan_is_not_chosen():
    q, k, v = (t.detach() for t in inputs("cpu", 1, 20, 1, 1))
    k[:] = 0
    v[:] = torch.arange(20.0)[None, :, None, None]
    k[:, 5] = torch.nan
    out = tm.moba_attention(q, k, v, block=4, topk=3)
    assert out[0, 0, 0, 0].item() == pytest.approx((1.5 + 9.5 + 17.5) / 3)  # blocks 0, 2 and 4


def test_malformed_calls():
    q, k, v = inputs("cpu", 5, 9)
    for options, rule in (
        ({"block": 24}, "block: must be a power of two up to 128 or a multiple of 128; got 24"),
        ({"block": 0}, "block: must be a power of two up to 128 or a multiple of 128; got 0"),
        ({"topk": 0}, "topk: must be 1 to 65536; got 0"),
        ({"seqlens_k": torch.zeros(2)}, r"seqlens_k: must have shape [1]; got [2]"),
    ):
        with pytest.raises(RuntimeError) as error:
            tm.moba_attention(q, k, v, **options)
        assert str(error.value) == f"tokenmill.moba_attention: {rule}"
