"""Attention to listed blocks over sharded sequences: results and gradients of one process, the same
bits on every run, and no byte that a rank does not need."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import tokenmill as tm
import tokenmill.distributed as tmd

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


def search_on_a_rank(sizes, dtype):
    draw = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, sum(sizes), h, 16, generator=draw).to(dtype) for h in (4, 2, 2))
    own = shard(sizes)
    wrong = []
    for name, options in SEARCHES.items():
        how = {"budget": 16, "block_q": 16, "block_k": 4, "num_recent": 16, **options}
        exact = tm.hip_attention(
            *(x.double() for x in (q, k, v)), return_lse=True, backend="reference", **how
        )
        plain = tm.hip_attention(q, k, v, return_lse=True, **how)
        mine = [x[:, own].detach().requires_grad_() for x in (q, k, v)]
        found = tmd.hip_attention(*mine, sizes=sizes, return_lse=True, **how)
        again = tmd.hip_attention(*mine, sizes=sizes, **how)
        again.sum().backward()
        results = [dict(zip(("out", "lse"), x, strict=True)) for x in (found, exact, plain)]
        wrong += [(name, *what) for what in wrong_results(*results, own, dtype)]
        if not (found[0].equal(again) and all(x.grad.isfinite().all() for x in mine)):
            wrong.append((name, "bits or gradients"))
    return wrong


SEARCHES = {
    "sample": {},
    "group": {"head_reduce": "group_max", "num_sink": 5, "softcap": 3.0},
    "minmax, not causal": {"bound": "minmax", "causal": False, "num_recent": 0},
}


@pytest.mark.parametrize(
    ("sizes", "dtype"), [((160, 77), torch.float32), ((96, 0, 128), torch.bfloat16)]
)
def test_hip_finds_the_blocks_of_one_process(ranks, sizes, dtype):
    for found in ranks(len(sizes)).run(search_on_a_rank, sizes, dtype):
        assert not found


DECODES = {
    "lists": {},
    "recent": {"num_sink": 13, "num_recent": 9, "softcap": 4.0},
    "rope": {"rope": True, "num_recent": 5, "block_k": 4},
    "extra": {"extra": True, "sink": True, "rope": True, "interleaved": True, "num_sink": 1},
    "blocks": {"block_k": 8, "num_sink": 30, "num_recent": 40},
    "all are recent": {"num_recent": 2**40},
}


def decode_on_a_rank(sizes, rows, dtype, form, list_heads):
    draw = torch.Generator().manual_seed(rows)
    total, own = sum(sizes), shard(sizes)
    lengths = [total, total // 2, rows, 0, 7, sizes[0], sizes[0] + 1, total - 1]
    lengths = torch.tensor(lengths, dtype=torch.int32)
    batch = len(lengths)
    q = torch.randn(batch, rows, 4, 16, generator=draw).to(dtype)
    k, v = (torch.randn(batch, total, 2, n, generator=draw).to(dtype) for n in (16, 24))
    angles = torch.rand(total, 8, generator=draw) * 6
    extra_k, extra_v = (torch.randn(batch, 3, 2, n, generator=draw).to(dtype) for n in (16, 24))
    values = {
        "rope": {"rope": (angles.cos(), angles.sin())},
        "sink": {"sink": torch.randn(4, generator=draw)},
        "extra": {
            "extra_k": extra_k, "extra_v": extra_v,
            "extra_log_count": torch.rand(batch, 2, 3, generator=draw),
        },
    }  # fmt: skip
    wrong = []
    for name, options in DECODES.items():
        block_k = options.get("block_k", 1)
        shape = (batch, list_heads, 20)
        indices = torch.randint(-2, total // block_k + 3, shape, generator=draw)
        orderly = torch.rand(shape[:2], generator=draw)[..., None] < 0.7
        indices = torch.where(orderly, indices.sort(-1).values, indices).int()
        counts = torch.randint(-1, 23, shape[:2], generator=draw).int()
        how = {"seqlens_k": lengths, "return_mass": form == "mass"}
        for key, x in options.items():
            how |= values[key] if x is True and key in values else {key: x}
        exact = tm.sparse_decode_attention(
            q.double(), k.double(), v.double(), indices, counts, backend="reference",
            **{n: x.double() if n in ("extra_k", "extra_v") else x for n, x in how.items()},
        )  # fmt: skip
        plain = tm.sparse_decode_attention(q, k, v, indices, counts, **how)
        cache = [x[:, own] for x in (k, v)]
        if form == "pages":
            pages = torch.randperm(batch * sizes[dist.get_rank()] // 8)
            how["block_table"] = pages.int().view(batch, -1)
            cache = [in_pages(x, how["block_table"], 8) for x in cache]
        found, again = (
            tmd.sparse_decode_attention(q, *cache, indices, counts, sizes=sizes, **how)
            for _ in range(2)
        )
        names = ("out", "lse", "mass")[: len(found)]
        results = [dict(zip(names, x, strict=True)) for x in (found, exact, plain)]
        wrong += [(name, *what) for what in wrong_results(*results, slice(None), dtype)]
        wrong += [(name, "bits") for x, y in zip(found, again, strict=True) if not x.equal(y)]
    return wrong


def in_pages(x, table, size):
    """A cache [B, n, ...] as pages [P, size, ...] that the table names."""
    found = torch.empty(table.numel(), size, *x.shape[2:], dtype=x.dtype)
    found[table.flatten().long()] = x.unflatten(1, (-1, size)).flatten(0, 1)
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("sizes", "dtype", "form", "list_heads"),
    [
        ((24, 40), torch.float32, "pages", 1),
        ((40, 29), torch.float32, "mass", 2),
        ((24, 0, 33), torch.float32, "mass", 4),
        ((8, 16, 8, 41), torch.bfloat16, "views", 4),
    ],
)
def test_decode_of_listed_keys(ranks, sizes, dtype, form, list_heads, rows):
    for found in ranks(len(sizes)).run(decode_on_a_rank, sizes, rows, dtype, form, list_heads):
        assert not found
