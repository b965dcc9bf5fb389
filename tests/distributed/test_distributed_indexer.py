"""The indexer's lists of keys sharded over ranks equal one process's lists, on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import refusals

import tokenmill as tm
import tokenmill.distributed as tmd

OPTIONS = (
    {},
    {"topk": 100},
    {"causal": False, "num_sink": 11},
    {"num_sink": 2, "num_recent": 5, "activation": "none"},
    {"num_recent": 2**40},
    {"block_k": 4, "topk": 3, "num_recent": 3},
)


def tensors(batch, rows, total, dtype):
    """Integers, so that scores are exact, with ties and keys that may not be listed."""
    draw = torch.Generator().manual_seed(rows + total)

    def whole(*shape):
        return torch.randint(-3, 4, shape, generator=draw).to(dtype)

    q, k, weights = whole(batch, rows, 3, 8), whole(batch, total, 8), whole(batch, rows, 3)
    k[0, ::7] = torch.nan
    k[1, 3:9] = k[1, :1]
    return q, k, weights


def lists_on_a_rank(sizes, rows, dtype, form):
    """Calls whose lists differ from one process."""
    rank, total = dist.get_rank(), sum(sizes)
    lengths = torch.tensor([total, total // 2, rows, sizes[0] + 1], dtype=torch.int32)
    q, k, weights = tensors(len(lengths), rows, total, dtype)
    own = k[:, sum(sizes[:rank]) : sum(sizes[: rank + 1])]
    wrong = []
    for options in OPTIONS:
        how = {"topk": 5, "seqlens_k": lengths, "return_values": True, **options}
        mine, queries, factors = {}, q, weights
        if form == "packed":
            how["cu_seqlens_q"] = torch.tensor([0, rows, rows + 1, rows + 1, 2 * rows]).int()
            queries, factors = q[:2].flatten(0, 1), weights[:2].flatten(0, 1)
        if form == "pages":
            del how["seqlens_k"]
            each = sizes[rank] // 4
            table = torch.randperm(len(k) * each).int().view(len(k), each)
            pages = k.new_empty(len(k) * each, 4, 8)
            pages[table.flatten().long()] = own.unflatten(1, (each, 4)).flatten(0, 1)
            own, mine = pages, {"block_table": table}
        want = tm.indexer_topk_select(queries, k, factors, **how)
        found = tmd.indexer_topk_select(queries, own, factors, sizes=sizes, **mine, **how)
        if form == "pages":
            own = k[:, sum(sizes[:rank]) : sum(sizes[: rank + 1])]
        if not all(x.dtype == y.dtype and x.equal(y) for x, y in zip(found, want, strict=True)):
            wrong.append((options, form))
    return wrong


CASES = (
    ((20, 21), 1, torch.float32, "padded"),
    ((12, 0, 20, 9), 6, torch.float32, "padded"),
    ((4, 16, 20), 6, torch.bfloat16, "pages"),
    ((20, 4, 17), 6, torch.float32, "packed"),
)


@pytest.mark.parametrize(("sizes", "rows", "dtype", "form"), CASES)
def test_lists_are_those_of_one_process(ranks, sizes, rows, dtype, form):
    for wrong in ranks(len(sizes)).run(lists_on_a_rank, sizes, rows, dtype, form):
        assert not wrong


def float8_on_a_rank(sizes, rows, paged):
    """float8 keys, each with a power of two as its scale: scores are exact."""
    rank, total = dist.get_rank(), sum(sizes)
    q, k, weights = tensors(4, rows, total, torch.float32)
    scale = 2.0 ** torch.randint(-2, 3, k.shape[:2], generator=torch.Generator().manual_seed(1))
    codes, own = k.to(torch.float8_e4m3fn), slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    how = {"topk": 5, "num_sink": 1, "return_values": True}
    want = tm.indexer_topk_select(q, codes, weights, k_scale=scale, **how)
    mine, each = {"k_scale": scale[:, own]}, codes[:, own]
    if paged:
        each, mine["k_scale"] = (
            x.unflatten(1, (-1, 4)).flatten(0, 1).flip(0) for x in (each, mine["k_scale"])
        )
        mine["block_table"] = torch.arange(len(each)).flip(0).int().view(4, -1)
    found = tmd.indexer_topk_select(q, each, weights, sizes=sizes, **mine, **how)
    return [x.equal(y) for x, y in zip(found, want, strict=True)]


@pytest.mark.parametrize(("sizes", "rows", "paged"), [((20, 21), 1, False), ((4, 16), 6, True)])
def test_keys_in_float8(ranks, sizes, rows, paged):
    for same in ranks(len(sizes)).run(float8_on_a_rank, sizes, rows, paged):
        assert all(same)


def errors_on_a_rank():
    q, k, weights = torch.zeros(1, 2, 3, 8), torch.zeros(1, 16, 8), torch.zeros(1, 2, 3)
    far = torch.tensor([33], dtype=torch.int32)
    calls = [
        lambda: tmd.indexer_topk_select(q, k[0], weights, 4),
        lambda: tmd.indexer_topk_select(q, k.double(), weights, 4),
        lambda: tmd.indexer_topk_select(q, k, weights, 0),
        lambda: tmd.indexer_topk_select(q, k, weights, 4, block_k=32),
        lambda: tmd.indexer_topk_select(q, k, weights, 4, sizes=(15, 17)),
        lambda: tmd.indexer_topk_select(q, k, weights, 4, seqlens_k=far),
        lambda: tmd.indexer_topk_select(q, k, weights, 4, backend="gpu"),
        lambda: tmd.indexer_topk_select(q, k, weights, 4, k_scale=weights[0]),
    ]
    found = refusals(calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENMILL_CHECK", "1")
        differ = [lambda: tmd.indexer_topk_select(q, k, weights, 4 + dist.get_rank())]
        return found + refusals(differ)


def test_errors_name_argument_rule_and_value(ranks):
    rules = (
        "k: must have 3 dimensions [B, S, D] or [pages, page_size, D]; got 2",
        "k: must have the dtype of q, float32, or float8_e4m3fn; got float64",
        "topk: must be 1 to 65536; got 0",
        "sizes: must start each rank at a multiple of block_k, 32; rank 1; got 16",
        "k: must have 15 positions on rank 0 of 2, of 32; got 16",
        "seqlens_k: must be 0 to 32; got 33",
        "backend: must be one of",
        "k_scale: requires a cache in float8_e4m3fn; got float32",
        "topk: must be that of rank 1 in group",
    )
    for found, rule in zip(ranks(2).run(errors_on_a_rank)[0], rules, strict=True):
        assert f"tokenmill.distributed.indexer_topk_select: {rule}" in found
