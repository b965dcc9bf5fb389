"""Block-sparse attention over sharded sequences: results and gradients of one process, the same
bits on every run, and no byte that a rank does not need."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from ranks import refusals

import tokenmill as tm
import tokenmill.distributed as tmd
from tokenmill.distributed._group import Group
from tokenmill.distributed.sparse_decode_attention import _as_pages
from tokenmill.reference.sparse.block_sparse_attention import visible_and_added
from tokenmill.sparse.block_sparse_attention import SPEC

BLOCKS = {"block_q": 16, "block_k": 8}
OPTIONS = {
    "lists": {},
    "first keys": {"num_sink": 11, "softcap": 5.0},
    "causal": {"causal": True, "scale": 0.3},
    "first and last keys": {"causal": True, "num_sink": 3, "num_recent": 18},
    "all keys are first": {"causal": True, "num_sink": 2**40},
    "all keys are last": {"causal": True, "num_recent": 2**40},
}
SIZES = ((32, 21), (48, 0, 32), (0, 16, 16, 5))


def lists(draw, batch, heads, tokens, entries=6):
    """Lists with repeated, unordered or invalid entries, and entries beyond the count."""
    rows, blocks = -(-tokens // 16), -(-tokens // 8)
    shape = (batch, heads, rows, entries)
    indices = torch.randint(-2, blocks + 3, shape, generator=draw)
    orderly = torch.rand(shape[:-1], generator=draw)[..., None] < 0.7
    indices = torch.where(orderly, indices.sort(-1).values, indices)
    indices[:, 0, :, 0] = -(2**31)
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
        """Returns out, lse and gradients of the tokens `own`, which start at a row of lists."""
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
    """Slice of this rank's tokens."""
    rank = dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def wrong_results(found, exact, plain, own, dtype):
    """Results of this rank's tokens that exceed the error budget."""
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
    """Maximum difference; -inf - -inf is NaN and counts as 0: both rows see nothing."""
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


def moved_on_a_rank(sizes):
    """Per call, the elements of keys and values that a rank needs from others, that it receives,
    and that it sends in the backward."""
    case, own, rank = Case(sum(sizes), list_heads=4), shard(sizes), dist.get_rank()
    moved = []
    send = Group.send

    def counted(self, x, sent, received):
        if x.dtype == torch.float32:
            moved.append((sum(sent) - sent[rank], sum(received) - received[rank]))
        return send(self, x, sent, received)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "send", counted)
        for options in OPTIONS.values():
            moved.clear()
            case.run(tmd.block_sparse_attention, options, own, sizes=sizes)
            (_, forward), (backward, _) = moved
            found.append((seen_of_others(case, options, own) * 8 * (16 + 24), forward, backward))
    return found


def seen_of_others(case, options, own):
    """Per KV head, blocks of which a query in `own` sees a key outside `own`."""
    call = SPEC.record(*case.tokens, *case.lists, **BLOCKS, **options)
    seen, _ = visible_and_added(call)
    seen = seen[:, :, own].any(2)
    seen = seen.unflatten(1, (2, 2)).any(2)
    seen[..., own] = False
    blocks = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return int(blocks.any(-1).sum())


def test_only_blocks_that_a_rank_needs_move(ranks):
    for of_rank in ranks(3).run(moved_on_a_rank, (32, 16, 37)):
        assert any(needed for needed, *_ in of_rank)
        assert all(needed == forward == backward for needed, forward, backward in of_rank)


def search_on_a_rank(sizes, dtype):
    """Compares lists with one process, and results and gradients with the error budget."""
    lists = []
    module = sys.modules["tokenmill.distributed.hip_attention"]

    def search(*args, **how):
        lists.append(tm.hip_block_select(*args, **how))
        return lists[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "hip_block_select", search)
        return _search_on_a_rank(sizes, dtype, lists)


def _search_on_a_rank(sizes, dtype, lists):
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
        sink = -(-how.get("num_sink", 16) // 4) * 4
        of_search = {n: x for n, x in how.items() if n != "softcap"} | {"num_sink": sink}
        rows = slice(own.start // 16, -(-own.stop // 16))
        whole = [x[:, :, rows] for x in tm.hip_block_select(q, k, **of_search)]
        if not all(x.equal(y) for x, y in zip(lists[-1], whole, strict=True)):
            wrong.append((name, "lists"))
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
        indices[:, 0, 0] = -(2**31)
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
    """Splits a cache [B, n, ...] into pages [P, size, ...] that the table names."""
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


def _layouts(batch, tokens):
    """Caches [B, tokens, 2, 8] with various memory layouts, and whether pages are views of them."""
    x = torch.randn(batch, tokens + 5, 2, 8)
    yield x[:, :tokens], True
    yield x[:, 2 : tokens + 2].contiguous(), True
    yield x[:, :tokens].transpose(1, 2).contiguous().transpose(1, 2), True
    yield x[:1, :tokens].expand(batch, -1, -1, -1), batch == 1 or tokens == 1
    yield x[:, :1].expand(-1, tokens, -1, -1), batch == 1 or tokens == 1
    # Requests that are a fractional number of rows apart.
    odd = torch.randn(batch * (tokens * 16 + 3))
    odd = odd.as_strided((batch, tokens, 2, 8), (tokens * 16 + 3, 16, 8, 1))
    yield odd, batch == 1 or tokens == 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 192])
def test_a_cache_as_pages(batch, tokens):
    for k, view in _layouts(batch, tokens):
        for v, _ in _layouts(batch, tokens):
            *pages, table = _as_pages(k, v)
            for whole, paged in zip((k, v), pages, strict=True):
                assert paged[table.long()].flatten(1, 2).equal(whole)
        *pages, _ = _as_pages(k, k)
        assert all((x.data_ptr() == k.data_ptr()) == view for x in pages)


def forms_on_a_rank():
    """A group of one rank, autocast, the gradient of a single tensor, and no double backward."""
    rank, wrong = dist.get_rank(), []
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    case = Case(32)
    how = {**BLOCKS, "causal": True}
    x, y = (
        f(*case.tokens, *case.lists, **how, **g)
        for f, g in (
            (tmd.block_sparse_attention, {"group": alone}),
            (tm.block_sparse_attention, {}),
        )
    )
    if not x.equal(y):
        wrong.append("alone")
    own = shard((16, 16))
    tokens = [t[:, own] for t in case.tokens]
    rows = [t[:, :, rank : rank + 1] for t in case.lists]
    with torch.autocast("cpu", torch.bfloat16):
        found = tmd.block_sparse_attention(*tokens, *rows, **how)
    if not found.equal(tmd.block_sparse_attention(*(t.bfloat16() for t in tokens), *rows, **how)):
        wrong.append("autocast")
    together = case.run(tmd.block_sparse_attention, {"causal": True}, own)
    for at, name in enumerate("qkv"):
        leaves = [t.detach().requires_grad_(i == at) for i, t in enumerate(tokens)]
        out, lse = tmd.block_sparse_attention(*leaves, *rows, **how, return_lse=True)
        loss = (out * case.dout[:, own]).sum()
        (loss + (lse * case.dlse[..., own])[lse.isfinite()].sum()).backward()
        if not leaves[at].grad.allclose(together["d" + name], atol=1e-5):
            wrong.append(name)
    leaf = tokens[2].detach().requires_grad_()
    out = tmd.block_sparse_attention(*tokens[:2], leaf, *rows, **how)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    try:
        grad.sum().backward()
        wrong.append("double backward")
    except RuntimeError:
        pass
    return wrong


def test_other_forms_of_the_call(ranks):
    for wrong in ranks(2).run(forms_on_a_rank):
        assert not wrong


def errors_on_a_rank():
    x, rank = torch.zeros(1, 32, 2, 8), dist.get_rank()
    ids = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    blocks = (x, x, x, ids, ids[..., 0])
    decode = (x[:, :1], x, x, ids[:, :, 0], ids[:, :, 0, 0])
    lengths = torch.tensor([40], dtype=torch.int32)
    wide = {"block_q": 16, "block_k": 16}
    rope = torch.zeros(64, 4)
    calls = [
        lambda: tmd.block_sparse_attention(*blocks, block_q=16, block_k=64),
        lambda: tmd.block_sparse_attention(*blocks, block_q=16, block_k=24),
        lambda: tmd.block_sparse_attention(*blocks, **wide, length=65),
        lambda: tmd.block_sparse_attention(*blocks, **wide, sizes=32),
        lambda: tmd.block_sparse_attention(*blocks, **wide, num_recent=1),
        lambda: tmd.block_sparse_attention(x, x[:, 1:], x[:, 1:], *blocks[3:], **wide),
        lambda: tmd.block_sparse_attention(*blocks[:3], ids.long(), ids[..., 0], **wide),
        lambda: tmd.hip_attention(x, x, x, budget=3),
        lambda: tmd.hip_attention(x, x, x, block_k=3, budget=3),
        lambda: tmd.hip_attention(x, x, x.double()),
        lambda: tmd.sparse_decode_attention(*decode, seqlens_k=lengths + 25),
        lambda: tmd.sparse_decode_attention(*decode, seqlens_k=lengths, sizes=(31, 33)),
        lambda: tmd.sparse_decode_attention(*decode, seqlens_k=lengths, block_k=64),
        lambda: tmd.sparse_decode_attention(
            *decode, seqlens_k=lengths, rope=(rope, rope), pos_mode="cache"
        ),
        lambda: tmd.sparse_decode_attention(*decode, seqlens_k=lengths, rope=(rope[:50],) * 2),
        lambda: tmd.sparse_decode_attention(
            x[:, :1].clone().requires_grad_(), *decode[1:], seqlens_k=lengths
        ),
        lambda: tmd.sparse_decode_attention(*decode, seqlens_k=lengths, backend="gpu"),
    ]
    found = refusals(calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENMILL_CHECK", "1")
        differ = [
            lambda: tmd.block_sparse_attention(*blocks, **wide, num_sink=rank),
            lambda: tmd.hip_attention(x, x, x, bound=("sample", "minmax")[rank], block_q=16),
            lambda: tmd.sparse_decode_attention(*decode[:3], *(decode[3] + rank, decode[4]),
                                                seqlens_k=lengths),
        ]  # fmt: skip
        return found + refusals(differ)


def test_errors_name_argument_rule_and_value(ranks):
    starts = "sizes: must start each rank at a multiple of"
    rules = (
        f"block_sparse_attention: {starts} block_q and block_k, 64; rank 1; got 32",
        "block_sparse_attention: block_k: must be a power of two up to 128; got 24",
        "block_sparse_attention: q: must have 33 tokens on rank 0 of 2, of 65; got 32",
        "block_sparse_attention: sizes: must be a sequence of integers; got 32",
        "block_sparse_attention: num_recent: requires causal; got 1",
        "block_sparse_attention: k: must have the 32 tokens of q; got 31",
        "block_sparse_attention: indices: must be int32; got int64",
        "hip_attention: budget: must be a multiple of block_k, from 1 to 2048 times; got 3",
        "hip_attention: block_k: must be a power of two up to 128; got 3",
        "hip_attention: v: must have the dtype of q, float32; got float64",
        "sparse_decode_attention: seqlens_k: must be 0 to 64; got 65",
        "sparse_decode_attention: k_cache: must have 31 positions on rank 0 of 2, of 64; got 32",
        f"sparse_decode_attention: {starts} block_k, 64; rank 1; got 32",
        "sparse_decode_attention: pos_mode: must be 'absolute' on several ranks: places count",
        "sparse_decode_attention: rope: must have all 64 positions of the cache; got 50",
        "sparse_decode_attention: q: must not require a gradient, there is none; got True",
        "sparse_decode_attention: backend: must be one of",
        "block_sparse_attention: num_sink: must be that of rank 1 in group",
        "hip_attention: bound: must be that of rank 1 in group",
        "sparse_decode_attention: checksum_of_indices: must be that of rank 1 in group",
    )
    for found, rule in zip(ranks(2).run(errors_on_a_rank)[0], rules, strict=True):
        assert f"tokenmill.distributed.{rule}" in found
