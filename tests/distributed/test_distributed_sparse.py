"""Attention to listed blocks over sharded sequences: results and gradients of one process, the same
bits on every run, and no byte that a rank does not need."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import tokenmill as tm
import tokenmill.distributed as tmd
from tokenmill.distributed._group import Group

BLOCKS = {"block_q": 16, "block_k": 8}
OPTIONS = {
    "lists": {},
    "first keys": {"num_sink": 11, "softcap": 5.0},
    "causal": {"causal": True, "scale": 0.3},
    "first and last keys": {"causal": True, "num_sink": 3, "num_recent": 21},
    "all keys are first": {"causal": True, "num_sink": 2**40},
    "all keys are last": {"causal": True, "num_recent": 2**40},
}
SIZES = ((32, 21), (48, 0, 32), (0, 16, 16, 5))


def lists(draw, batch, heads, tokens, entries=6):
    """Lists whose entries repeat, do not ascend, are no blocks or lie behind the count."""
    rows, blocks = -(-tokens // 16), -(-tokens // 8)
    shape = (batch, heads, rows, entries)
    indices = torch.randint(-2, blocks + 3, shape, generator=draw)
    orderly = torch.rand(shape[:-1], generator=draw)[..., None] < 0.7
    indices = torch.where(orderly, indices.sort(-1).values, indices)
    counts = torch.randint(-1, entries + 3, shape[:-1], generator=draw)
    return indices.int(), counts.int()


class Case:
    """A call on whole sequences, the same on every rank."""

    def __init__(self, tokens, dtype=torch.float32, heads=(4, 2), list_heads=2):
        draw = torch.Generator().manual_seed(tokens + list_heads)

        def normal(heads, dim):
            return torch.randn(2, tokens, heads, dim, generator=draw).to(dtype)

        self.tokens = normal(heads[0], 16), normal(heads[1], 16), normal(heads[1], 24)
        self.lists = lists(draw, 2, list_heads, tokens)
        self.dout = normal(heads[0], 24)
        self.dlse = torch.randn(2, heads[0], tokens, generator=draw)

    def run(self, attention, options, own=slice(None), dtype=None, **how):
        """out, lse and gradients of the tokens `own`, which start at a row of lists."""
        q, k, v = (x[:, own].to(dtype or x.dtype).detach().requires_grad_() for x in self.tokens)
        of_rows = slice(own.start and own.start // 16, own.stop and -(-own.stop // 16))
        found = [x[:, :, of_rows] for x in self.lists]
        out, lse = attention(q, k, v, *found, return_lse=True, **BLOCKS, **options, **how)
        seen = lse.isfinite()
        loss = (out * self.dout[:, own].to(out.dtype)).sum()
        loss = loss + (lse * self.dlse[..., own])[seen].sum()
        loss.backward()
        results = out.detach(), lse.detach(), q.grad, k.grad, v.grad
        return dict(zip(("out", "lse", "dq", "dk", "dv"), results, strict=True))


def shard(sizes):
    """The tokens of this rank."""
    rank = dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def wrong_results(found, exact, plain, own, dtype):
    """Results of this rank's tokens beyond the error budget."""
    wrong = []
    for name, x in found.items():
        at = (..., own) if name == "lse" else (slice(None), own)
        want, beside = exact[name][at], plain[name][at]
        if not (x.isfinite().equal(want.isfinite()) and x.dtype == beside.dtype):
            wrong.append((name, "not finite, or of another dtype"))
        floor = 4 * torch.finfo(dtype).eps * exact[name].nan_to_num(0, 0, 0).abs().max()
        allowed = 3 * _largest(beside - want) + floor
        if not _largest(x - want) <= allowed:
            wrong.append((name, _largest(x - want).item(), allowed.item()))
    return wrong


def _largest(x):
    """-inf - -inf is NaN: both see nothing."""
    return x.nan_to_num(0, 0, 0).abs().max() if x.numel() else torch.zeros(())


def blocks_on_a_rank(sizes, dtype, list_heads):
    case = Case(sum(sizes), dtype, (4, 2), list_heads)
    own = shard(sizes)
    wrong = []
    for name, options in OPTIONS.items():
        exact = case.run(
            tm.block_sparse_attention, options, dtype=torch.float64, backend="reference"
        )
        plain = case.run(tm.block_sparse_attention, options)
        found, again = (
            case.run(tmd.block_sparse_attention, options, own, sizes=sizes) for _ in range(2)
        )
        wrong += [(name, *what) for what in wrong_results(found, exact, plain, own, dtype)]
        wrong += [(name, n, "other bits") for n, x in found.items() if not x.equal(again[n])]
    return wrong


@pytest.mark.parametrize("list_heads", [1, 2, 4])
@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_listed_blocks_of_one_process(ranks, sizes, list_heads):
    for found in ranks(len(sizes)).run(blocks_on_a_rank, sizes, torch.float32, list_heads):
        assert not found


def test_listed_blocks_in_bfloat16(ranks):
    for found in ranks(3).run(blocks_on_a_rank, (32, 16, 21), torch.bfloat16, 4):
        assert not found
