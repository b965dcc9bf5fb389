"""DTensor features: parallel modules, FSDP, graphs, errors. Each scenario runs on every rank of
four and raises on failure."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import tokenmill as tm

HEADS, KV_HEADS, DIM, WIDTH = 8, 4, 16, 32


class Block(nn.Module):
    """Projections around an operator."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.q = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.k = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.v = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.o = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, DIM)) for p in (self.q, self.k, self.v))
        if self.linear:
            slopes = tm.lightning_slopes(HEADS)  # a plain tensor
            out = tm.linear_attention(q, k, v, log_decay=-slopes)
        else:
            out = tm.attention(q, k, v, causal=True)
        return self.o(out.flatten(-2))


def blocks(linear):
    torch.manual_seed(0)
    whole = Block(linear)
    torch.manual_seed(0)
    return (
        whole,
        Block(linear),
        torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(1)),
    )


def parallel(block, mesh):
    columns = ColwiseParallel(use_local_output=False)
    return parallelize_module(
        block, mesh, {"q": columns, "k": columns, "v": columns, "o": RowwiseParallel()}
    )


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def check_training(whole, split, run, x, mine=slice(None)):
    """Compares one training step of both; mine: the sequences of this rank."""
    want, got = whole(x), run(x[mine])
    torch.testing.assert_close(full(got), want[mine])
    want.square().mean().backward()
    full(got).square().mean().backward()
    for (name, p), (_, s) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
        torch.testing.assert_close(full(s.grad), p.grad, msg=name)


def tensor_parallel_attention(mesh):
    whole, split, x = blocks(False)
    split = parallel(split, mesh["model"])
    with CommDebugMode() as comm:
        split(x).sum()
    assert sum(comm.get_comm_counts().values()) == 1, comm.get_comm_counts()  # last product
    check_training(whole, split, split, x)


def tensor_parallel_linear_attention(mesh):
    whole, split, x = blocks(True)
    split = parallel(split, mesh["model"])
    check_training(whole, split, split, x)


def compiled_tensor_parallel(mesh):
    whole, split, x = blocks(False)
    split = parallel(split, mesh["model"])
    run = torch.compile(split, fullgraph=True, backend="aot_eager")
    check_training(whole, split, run, x)


def compiled_for_any_length(mesh):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(q):
        return tm.attention(q, q, q, causal=True)

    for length in (4, 9):
        (q,) = draw((2, length, 4, 16))
        got = run(distribute_tensor(q, mesh["model"], [Shard(2)]))
        torch.testing.assert_close(full(got), tm.attention(q, q, q, causal=True))


def fully_sharded(mesh):
    whole, split, x = blocks(False)
    split = fully_shard(split, mesh=mesh["data"])
    rank = mesh.get_local_rank("data")
    want = whole(x)
    got = split(x[rank : rank + 1])
    torch.testing.assert_close(got, want[rank : rank + 1])
    want.square().mean().backward()
    got.square().mean().backward()
    for p, s in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(full(s.grad), p.grad)


def fully_sharded_and_tensor_parallel(mesh):
    whole, split, x = blocks(False)
    split = fully_shard(parallel(split, mesh["model"]), mesh=mesh["data"])
    rank = mesh.get_local_rank("data")
    want, got = whole(x), split(x[rank : rank + 1])
    torch.testing.assert_close(got, want[rank : rank + 1])
    want.square().mean().backward()
    got.square().mean().backward()
    for p, s in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(full(s.grad), p.grad)


def draw(*shapes):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def shared_key_heads(mesh):
    """With more ranks than KV heads, a rank reads the KV head of its query heads."""
    flat = mesh._flatten("all")
    for kv_heads in (1, 2):
        q, k, v = draw((2, 9, 8, 16), (2, 9, kv_heads, 16), (2, 9, kv_heads, 16))
        whole = [t.clone().requires_grad_() for t in (q, k, v)]
        want = tm.attention(*whole)
        want.sum().backward()
        places = [Shard(2)], [Replicate()], [Replicate()]
        split = [
            distribute_tensor(t, flat, p).requires_grad_()
            for t, p in zip((q, k, v), places, strict=True)
        ]
        got = tm.attention(*split)
        assert got.placements == (Shard(2),)
        torch.testing.assert_close(full(got), want)
        got.sum().backward()
        assert split[1].grad.placements == (Partial(),)
        for s, w in zip(split, whole, strict=True):
            torch.testing.assert_close(full(s.grad), w.grad)


def uneven_shards(mesh):
    flat = mesh._flatten("all_uneven")
    q, k, v = draw(*((3, 7, 6, 16),) * 3)
    for dim in (0, 2):  # 1, 1, 1 and 0 sequences; 2, 2, 2 and 0 heads
        split = [distribute_tensor(t, flat, [Shard(dim)]).requires_grad_() for t in (q, k, v)]
        whole = [t.clone().requires_grad_() for t in (q, k, v)]
        got, want = tm.attention(*split), tm.attention(*whole)
        torch.testing.assert_close(full(got), want)
        got.sum().backward()
        want.sum().backward()
        for s, w in zip(split, whole, strict=True):
            torch.testing.assert_close(full(s.grad), w.grad)


def masks_of_requests(mesh):
    (x,) = draw((4, 6, 4, 16))
    lengths = torch.tensor([3, 0, 6, 1], dtype=torch.int32)
    ids = torch.tensor([[0, 0, 1, 1, 2, 2]] * 4, dtype=torch.int32)
    masks = tm.masks.prefix(lengths), tm.masks.segments(ids, shared=1)
    own = [distribute_tensor(t, mesh["model"], [Shard(0)]) for t in (x, lengths, ids)]
    segments = [
        tm.masks.segments(*pair, shared=1)
        for pair in ((own[2], own[2]), (own[2], ids), (ids, own[2]))
    ]
    for split in (masks, *((tm.masks.prefix(own[1]), each) for each in segments)):
        got = tm.attention(own[0], own[0], own[0], mask=split)
        torch.testing.assert_close(full(got), tm.attention(x, x, x, mask=masks))


def cotangents_come_as_they_are(mesh):
    """Partial inputs are reduced, and a gradient may be split differently from its result."""
    q, k, v = draw(*((2, 8, 4, 16),) * 3)
    whole = [t.clone().requires_grad_() for t in (q, k, v)]
    split = [distribute_tensor(t, mesh["model"], [Shard(2)]).requires_grad_() for t in (q, k, v)]
    got, want = tm.attention(*split), tm.attention(*whole)
    (dout,) = draw((2, 8, 4, 16))
    want.backward(dout)
    got.backward(distribute_tensor(dout, mesh["model"], [Shard(1)]))
    for s, w in zip(split, whole, strict=True):
        assert s.grad.placements == (Shard(2),)
        torch.testing.assert_close(full(s.grad), w.grad)
    half = DTensor.from_local(q / 2, mesh["model"], [Partial()])
    torch.testing.assert_close(full(tm.attention(half, *split[1:])), want)


def written_arguments(mesh):
    data = mesh["data"]
    q, k, v = draw(*((2, 1, 4, 16),) * 3)
    whole, state = (torch.zeros(2, 4, 16, 16) for _ in range(2))
    want = tm.linear_attention_decode(q, k, v, whole)
    split = distribute_tensor(state, data, [Shard(0)])
    got = tm.linear_attention_decode(
        *(distribute_tensor(t, data, [Shard(0)]) for t in (q, k, v)), split
    )
    torch.testing.assert_close(full(got), want)
    torch.testing.assert_close(full(split), whole)
    x, indices = torch.randn(2, 5, 8), torch.tensor([[0, 4], [3, 1]])
    x, out = (distribute_tensor(t, data, [Shard(0)]) for t in (x, torch.zeros(2, 2, 8)))
    assert tm.gather_tokens(x, indices, out=out) is out
    torch.testing.assert_close(full(out), tm.gather_tokens(full(x), indices))
    copy = distribute_tensor(state, data, [Replicate()])
    split = [distribute_tensor(t, data, [Shard(0)]) for t in (q, k, v)]
    rule = "state: must be Shard(0), as it is written and q is split along batch; got"
    with refused("linear_attention_decode", rule):
        tm.linear_attention_decode(*split, copy)
    rule = "state: must be a DTensor beside q, as it is written; got"
    with refused("linear_attention_decode", rule):
        tm.linear_attention_decode(*split, torch.zeros(2, 4, 16, 16))
    slots = torch.tensor([1, 0], dtype=torch.int32)
    rule = "state: must be split as q is, along batch, as it is written; got"
    with refused("linear_attention_decode", rule):
        tm.linear_attention_decode(*split, copy, state_indices=slots)
    out = distribute_tensor(torch.zeros(2, 2, 8), data, [Replicate()])
    with refused("gather_tokens", "out: must be Shard(0), as it is written and x is split along"):
        tm.gather_tokens(x, indices, out=out)
    with refused("gather_tokens", "out: must be Shard(0), as it is written and x is split along"):
        tm.gather_tokens(x, indices, out=out, backend="reference")


def refused(op, text):
    return pytest.raises(RuntimeError, match="^" + re.escape(f"tokenmill.{op}: {text}"))


def refusals(mesh):
    model = mesh["model"]
    q, k, v = draw(*((2, 8, 4, 16),) * 3)

    def on(t, *placements, mesh=model):
        return distribute_tensor(t, mesh, placements)

    heads = [on(t, Shard(2)) for t in (q, k, v)]
    rule = "q: must be split only along dimension 0 (batch) or 2 (heads); got"
    with refused("attention", rule):
        tm.attention(*(on(t, Shard(1)) for t in (q, k, v)))
    with refused("attention", "k: must be Shard(2) or Replicate, as q is split along heads; got"):
        tm.attention(heads[0], on(k, Shard(0)), heads[2])
    with refused("attention", "k: must have heads that 2 ranks share evenly; got 1"):
        tm.attention(heads[0], *(on(t[:, :, :1], Shard(2)) for t in (k, v)))
    with refused("attention", "sink: must be a DTensor beside q, as it requires a gradient; got"):
        tm.attention(*heads, sink=torch.zeros(4, requires_grad=True))
    with refused("attention", "k: must be on the mesh of q; got"):
        tm.attention(heads[0], on(k, Shard(2), mesh=mesh["data"]), heads[2])
    with refused("attention", "cu_seqlens_q: must be Replicate, as q is split along heads; got"):
        cu = on(torch.tensor([0, 8], dtype=torch.int32), Shard(0))
        tm.attention(*(t[0] for t in heads), cu_seqlens_q=cu, cu_seqlens_k=cu)
    with refused("attention", "k: must have the head dimension of q, 16; got 8"):
        tm.attention(heads[0], *(on(t[..., :8], Shard(2)) for t in (k, v)))
    with refused("mask_partition", "mask: must be the same on every rank; got"):
        tm.mask_partition(on(torch.ones(2, 4, dtype=torch.bool), Shard(0)))
    with refused("attention_row_scores", "q: must not be split along heads in this call; got"):
        tm.attention_row_scores(heads[0], heads[1], reduce="mean")
    rule = "gumbel_tau: must not be given where the call is split along heads; got 0.5"
    with refused("attention_column_scores", rule):
        tm.attention_column_scores(*heads[:2], gumbel_tau=0.5, seed=1)
    rule = "q: must be split only along dimension 0 (batch) or 2 (heads) (mesh dimension 1); got"
    with refused("attention", rule):
        tm.attention(*(on(t, Replicate(), Shard(1), mesh=mesh) for t in (q, k, v)))


def replicated_calls(mesh):
    """Nothing is split: every rank computes the whole call, also for an operator without an
    axis."""
    mask = torch.tensor([[True, False, True]])
    found = tm.mask_partition(distribute_tensor(mask, mesh["model"], [Replicate()]))
    for a, b in zip(found, tm.mask_partition(mask), strict=True):
        assert a.placements == (Replicate(),)
        assert torch.equal(full(a), b)


def reference_in_float64(mesh):
    q, k, v, sink = draw((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8), (4,))
    values = [t.double() for t in (q, k, v, sink)]
    whole = [t.clone().requires_grad_() for t in values]
    places = [Shard(0), Shard(2)], [Shard(0), Shard(2)], [Shard(0), Replicate()], [Replicate()] * 2
    split = [
        distribute_tensor(t, mesh, p).requires_grad_() for t, p in zip(values, places, strict=True)
    ]
    want, got = (tm.attention(*t[:3], sink=t[3]) for t in (whole, split))
    assert got.placements == (Shard(0), Shard(2))
    (dout,) = draw(want.shape)
    want.backward(dout.double())
    got.backward(distribute_tensor(dout.double(), mesh, [Replicate()] * 2))
    torch.testing.assert_close(full(got), want)
    for s, w in zip(split, whole, strict=True):
        torch.testing.assert_close(full(s.grad), w.grad)


def autocast(mesh):
    q, k, v = draw(*((2, 8, 4, 16),) * 3)
    split = [distribute_tensor(t, mesh["model"], [Shard(2)]) for t in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = tm.attention(*split), tm.attention(q, k, v)
    assert got.dtype == torch.bfloat16
    assert torch.equal(full(got), want)


def rules_come_with_the_first_call(mesh):
    """The process has not imported tokenmill.distributed."""
    assert "tokenmill.distributed" not in sys.modules
    (q,) = draw((2, 5, 4, 16))
    split = distribute_tensor(q, mesh["model"], [Shard(2)]).requires_grad_()
    tm.attention(split, split, split).sum().backward()
    assert split.grad.placements == (Shard(2),)


SCENARIOS = {
    f.__name__: f
    for f in (
        rules_come_with_the_first_call,
        tensor_parallel_attention,
        tensor_parallel_linear_attention,
        compiled_tensor_parallel,
        compiled_for_any_length,
        fully_sharded,
        fully_sharded_and_tensor_parallel,
        shared_key_heads,
        uneven_shards,
        masks_of_requests,
        cotangents_come_as_they_are,
        written_arguments,
        refusals,
        replicated_calls,
        reference_in_float64,
        autocast,
    )
}
