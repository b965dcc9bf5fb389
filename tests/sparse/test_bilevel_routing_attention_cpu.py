"""bilevel_routing_attention on CPUs: work partition, packed vectors of keys, instruction sets."""

from __future__ import annotations

import pytest
import torch
from conftest import backends

import tokenmill as tm
from tokenmill.sparse.bilevel_routing_attention_cases import bilevel_call

pytestmark = pytest.mark.skipif("cpu" not in backends(), reason="of the CPU backend")

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_isa = pytest.mark.parametrize("isa", tm.testing.cpu_isas(), indirect=True)


def results_and_gradients(args, kwargs):
    leaves = [t.detach().requires_grad_() for t in args]
    out, lse = tm.bilevel_routing_attention(*leaves, **kwargs, backend="cpu")
    seen = torch.where(lse.isfinite(), lse, 0.0)
    loss = (out.float() * out.detach().float()).sum() + (seen * seen.detach()).sum()
    return out, lse, *torch.autograd.grad(loss, leaves)


@each_dtype
@each_isa
@pytest.mark.parametrize(
    ("heads", "kv_heads", "graphs", "region", "topk"),
    [(1, 1, 1, (6, 7), 9), (2, 1, 2, (26, 11), 2), (6, 2, 2, (2, 2), 40), (4, 1, 1, (1, 3), 99)],
)
def test_shares_of_work_have_the_same_bits(
    heads, kv_heads, graphs, region, topk, dtype, isa, threads
):
    """With fewer KV heads than threads, threads share the tiles of a head, and its keys in the
    backward."""
    args, kwargs = bilevel_call(
        (26, 32), b=1, h=heads, hk=kv_heads, d=48, dv=72, graphs=graphs, region_size=region,
        topk=topk, mask_padding=False,
    )(dtype, torch.Generator().manual_seed(0))  # fmt: skip
    threads(1)
    want = results_and_gradients(args, kwargs)
    for n in (2, 8):
        threads(n)
        for a, b in zip(results_and_gradients(args, kwargs), want, strict=True):
            assert torch.equal(a, b)


@each_dtype
@each_isa
@pytest.mark.parametrize("region", [(1, 2), (3, 3), (4, 4), (5, 4), (8, 9)])
def test_a_region_stays_with_those_that_list_it(region, dtype, isa):
    """Small regions share packed vectors of keys; the ends of larger regions share a gathered
    vector."""
    size = 3 * region[0] - (region[0] > 1), 3 * region[1] - 1
    args, kwargs = bilevel_call(size, b=1, region_size=region, topk=0)(
        dtype, torch.Generator().manual_seed(0)
    )
    graph = torch.tensor([[r, r + 1, 8] for r in range(7)] + [[0, 1, -1], [1, 2, 3]]).int()
    kwargs["region_graph"] = graph[None, None]
    want = results_and_gradients(args, kwargs)
    for t in args[1:]:
        t[:, region[0] + (region[0] > 1), region[1]] = float("nan")  # region 4
    got = results_and_gradients(args, kwargs)

    def of(i, t):
        y, x = i // 3 * region[0], i % 3 * region[1]
        return t[:, y : y + region[0], x : x + region[1]]

    for r, listed in enumerate(graph.tolist()):
        for a, b in ((got[0], want[0]), (got[1].movedim(1, -1), want[1].movedim(1, -1)),
                     (got[2], want[2])):  # fmt: skip
            if 4 in listed:
                assert torch.isnan(of(r, a)).all()
            else:
                assert torch.equal(of(r, a), of(r, b))


@each_dtype
def test_a_call_agrees_with_its_heads_alone(dtype):
    """Rows of the heads of a GQA group share tiles."""
    (q, k, v), kwargs = bilevel_call(
        (13, 19), b=1, h=10, hk=2, d=64, dv=64, graphs=2, regions=(3, 4), topk=5
    )(dtype, torch.Generator().manual_seed(0))
    out, lse = tm.bilevel_routing_attention(q, k, v, **kwargs, backend="cpu")
    for h in range(10):
        at = slice(h // 5, h // 5 + 1)
        one = q[:, :, :, h : h + 1], k[:, :, :, at], v[:, :, :, at]
        alone = {**kwargs, "region_graph": kwargs["region_graph"][:, at]}
        found = tm.bilevel_routing_attention(*one, **alone, backend="cpu")
        assert torch.equal(found[0][:, :, :, 0], out[:, :, :, h])
        assert torch.equal(found[1][:, 0], lse[:, h])
