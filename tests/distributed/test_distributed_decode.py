"""Decode over a sharded cache, and exact top-k over sharded columns."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import refusals
from test_distributed_attention import has_statistic

import tokenmill as tm
import tokenmill.distributed as tmd

OPTIONS = {
    "softmax": {},
    "window": {"window": (13, 0)},
    "sink": {"sink": True, "score_bias": True, "softcap": 4.0},
    "alibi": {"alibi_slopes": True},
    "alibi in a window": {"alibi_slopes": True, "window": (20, -1)},
    "sigmoid": {"kind": "sigmoid", "score_bias": "neg_log_n"},
    "sum": {"kind": "relu", "normalize": "sum"},
    "linear": {"kind": "linear", "normalize": "sum"},
    "count": {"kind": "elu1", "normalize": "count", "window": (30, 0)},
}
FLOAT8 = torch.float8_e4m3fn
# Shapes of k_scale and v_scale for a float8 cache.
SCALES = {"softmax": ("token", "token"), "sink": ("head", "one"), "sum": ("token", None)}


def decode_on_a_rank(size, sizes, rows, names, dtype, paged):
    wrong = []
    draw = torch.Generator().manual_seed(3)
    total = sum(sizes)
    lengths = torch.tensor([total, total // 2, rows, 0, 7, sizes[0]], dtype=torch.int32)
    batch = len(lengths)
    q = torch.randn(batch, rows, 4, 16, generator=draw).to(dtype)
    k, v = (torch.randn(batch, total, 2, n, generator=draw).to(dtype) for n in (16, 24))
    parameter = torch.rand(4, generator=draw)
    rank = dist.get_rank()
    begin = sum(sizes[:rank])
    own = slice(begin, begin + sizes[rank])
    for name in names:
        options = {n: parameter if x is True else x for n, x in OPTIONS[name].items()}
        statistic = has_statistic(options)
        how = {"seqlens_k": lengths, "return_lse": statistic, **options}
        exact = tm.attention_decode(*(x.double() for x in (q, k, v)), backend="reference", **how)
        plain = tm.attention_decode(q, k, v, **how)
        cache = [x[:, own] for x in (k, v)]
        if paged:
            pages = torch.randperm(batch * sizes[rank] // 4, generator=draw).int().view(batch, -1)
            how["block_table"] = pages
            cache = [_in_pages(x, pages, 4) for x in cache]
        found = tmd.attention_decode(q, *cache, sizes=sizes, **how)
        again = tmd.attention_decode(q, *cache, sizes=sizes, **how)
        tuples = [x if statistic else (x,) for x in (found, exact, plain, again)]
        for got, want, beside, same in zip(*tuples, strict=True):
            assert got.equal(same) and got.dtype == beside.dtype
            finite = want.isfinite()
            assert got.isfinite().equal(finite)
            floor = 4 * torch.finfo(dtype).eps * want[finite].abs().max()
            allowed = 3 * (beside - want)[finite].abs().max() + floor
            error = (got - want)[finite].abs().max()
            if not error <= allowed:
                wrong.append((name, error.item(), allowed.item()))
    return wrong


def float8_on_a_rank(sizes, paged):
    """Wrong results of float8 caches, against caches of the decoded numbers."""
    draw, rank, total, wrong = torch.Generator().manual_seed(3), dist.get_rank(), sum(sizes), []
    lengths = torch.tensor([total, total // 2, 0, sizes[0]], dtype=torch.int32)
    batch = len(lengths)
    q = torch.randn(batch, 2, 4, 16, generator=draw)
    whole = [torch.randn(batch, total, 2, n, generator=draw).to(FLOAT8) for n in (16, 24)]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    table = torch.randperm(batch * (sizes[rank] // 4)).int().view(batch, sizes[rank] // 4)
    indices = torch.arange(0, total, 3, dtype=torch.int32).expand(batch, 1, -1).contiguous()
    counts = torch.full((batch, 1), indices.shape[2], dtype=torch.int32)
    for name, shapes in SCALES.items():
        full, mine = {}, {}
        for key, shape in zip(("k_scale", "v_scale"), shapes, strict=True):
            if shape is not None:
                size = {"one": (1,), "head": (2,), "token": (batch, total, 2)}[shape]
                full[key] = torch.rand(size, generator=draw) + 0.1
                mine[key] = full[key][:, own] if shape == "token" else full[key]
        if "v_scale" in mine:  # its strides differ from the cache
            mine["v_scale"] = mine["v_scale"].contiguous()
        cache = [x[:, own] for x in whole]
        how = {n: torch.ones(4) if x is True else x for n, x in OPTIONS[name].items()}
        how["seqlens_k"], here = lengths, {"sizes": sizes}
        if paged:
            here["block_table"] = table
            cache = [_in_pages(x, table, 4) for x in cache]
            mine = {n: x if x.dim() == 1 else _in_pages(x, table, 4) for n, x in mine.items()}
        cases = [(tmd.attention_decode, tm.attention_decode, (), how)]
        if name != "sum":
            options = {"seqlens_k": lengths, "num_sink": 2, "num_recent": 3}
            options["return_mass"] = name == "sink"
            lists = (tmd.sparse_decode_attention, tm.sparse_decode_attention, (indices, counts))
            cases.append((*lists, options))
        for ours, plain, more, options in cases:
            found = ours(q, *cache, *more, **mine, **here, **options)
            want = plain(q, *whole, *more, **full, **options)
            pairs = [(found, want)] if torch.is_tensor(found) else zip(found, want, strict=True)
            for got, right in pairs:
                if not torch.allclose(got, right, rtol=1e-5, atol=2e-6):
                    wrong.append((name, ours.__name__, (got - right).abs().max().item()))
    return wrong


@pytest.mark.parametrize(("sizes", "paged"), [((20, 24), True), ((12, 0, 13), False)])
def test_caches_in_float8(ranks, sizes, paged):
    for found in ranks(len(sizes)).run(float8_on_a_rank, sizes, paged):
        assert not found


def scales_on_a_rank():
    q, cache = torch.zeros(1, 1, 4, 16), torch.zeros(1, 8, 2, 16).to(FLOAT8)
    n, lists = torch.tensor([9], dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
    few, half = torch.ones(3), torch.ones(2).half()

    def sparse(keys, **scales):
        return tmd.sparse_decode_attention(q, keys, keys, lists, lists[0], seqlens_k=n, **scales)

    calls = [
        lambda: tmd.attention_decode(q, cache, cache, seqlens_k=n, k_scale=few),
        lambda: tmd.attention_decode(q, cache, cache, seqlens_k=n, v_scale=half),
        lambda: sparse(cache.float(), v_scale=few),
        lambda: sparse(cache, k_scale=few),
    ]
    return refusals(calls)


def test_scales_that_do_not_fit(ranks):
    shape = "must have shape [1], [2] or [1, 8, 2]; got [3]"
    rules = (
        f"attention_decode: k_scale: {shape}",
        "attention_decode: v_scale: must be float32; got float16",
        "sparse_decode_attention: v_scale: requires a cache in float8_e4m3fn; got float32",
        f"sparse_decode_attention: k_scale: {shape}",
    )
    for found in ranks(2).run(scales_on_a_rank):
        assert [f"tokenmill.distributed.{rule}" for rule in rules] == found


def _in_pages(x, pages, size):
    """Splits a cache [B, n, ...] into pages [P, size, ...] that the table names."""
    found = torch.empty(pages.numel(), size, *x.shape[2:], dtype=x.dtype)
    found[pages.flatten().long()] = x.unflatten(1, (-1, size)).flatten(0, 1)
    return found


@pytest.mark.parametrize("rows", [1, 3])
def test_decode_is_that_of_one_process(ranks, rows):
    cases = (
        ((24, 24), torch.float32, True),
        ((24, 0, 33), torch.float32, False),
        ((10, 11, 1, 40), torch.bfloat16, False),
    )
    for sizes, dtype, paged in cases:
        args = (len(sizes), sizes, rows, tuple(OPTIONS), dtype, paged)
        for found in ranks(len(sizes)).run(decode_on_a_rank, *args):
            assert not found


def topk_on_a_rank(sizes):
    draw = torch.Generator().manual_seed(1)
    rank, total = dist.get_rank(), sum(sizes)
    begin = sum(sizes[:rank])
    count = 0
    for dtype, ties in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        scores = torch.randn(9, total, generator=draw)
        if ties:
            scores = scores.round()
        scores[1, ::3] = torch.nan
        scores[2] = -torch.inf
        scores[3, 5:] = torch.inf
        scores[4] = 0.0
        scores[4, ::2] = -0.0
        scores = scores.to(dtype)
        lengths = torch.tensor([total, 5, 3, 0, total, 1, 9, total, 20], dtype=torch.int32)
        for k, tie, order, bounded in itertools.product(
            (1, 7, total + 3), ("low", "high"), ("index", "score"), (True, False)
        ):
            how = {
                "tie": tie, "order": order, "return_values": True,
                "lengths": lengths if bounded else None,
            }  # fmt: skip
            own = scores[:, begin : begin + sizes[rank]].contiguous()
            found = tmd.topk_select(own, k, sizes=sizes, **how)
            for got, want in zip(found, tm.topk_select(scores, k, **how), strict=True):
                assert got.dtype == want.dtype
                assert got.equal(want), (k, how)
            count += 1
    return count


def test_topk_of_the_union_is_exact(ranks):
    for sizes in ((20, 21), (30, 0, 11), (1, 2, 3, 60)):
        assert set(ranks(len(sizes)).run(topk_on_a_rank, sizes)) == {96}
