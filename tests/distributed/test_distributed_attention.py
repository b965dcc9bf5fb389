"""attention over sharded sequences: results and gradients of one process, for any schedule, order
and shard sizes, and the same bits on every run."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import tokenmill as tm
import tokenmill.distributed as tmd

SCHEDULES = ("ring", "allgather", "ulysses")
OPTIONS = {
    "softmax": {},
    "causal": {"causal": True},
    "window": {"window": (9, 4)},
    "causal window": {"causal": True, "window": (5, -1)},
    "softcap": {"causal": True, "softcap": 5.0, "scale": 0.3},
    "sink": {"causal": True, "sink": True, "score_bias": True},
    "sigmoid": {"kind": "sigmoid", "score_bias": "neg_log_n", "causal": True},
    "learned bias of sigmoid": {"kind": "sigmoid", "score_bias": True},
    "relu": {"kind": "relu", "normalize": "sum", "causal": True},
    "linear": {"kind": "linear", "normalize": "sum"},
    "elu1": {"kind": "elu1", "normalize": "count", "window": (20, 3)},
    "taylor2": {"kind": "taylor2", "normalize": "sum"},
}


def has_statistic(options):
    return options.get("kind", "softmax") == "softmax" or options.get("normalize") == "sum"


class Case:
    """A call on whole sequences, the same on every rank."""

    def __init__(self, length, options, dtype=torch.float32, heads=(8, 4), packed=()):
        draw = torch.Generator().manual_seed(length)
        lead = (length,) if packed else (2, length)

        def normal(*shape):
            return torch.randn(shape, generator=draw).to(dtype)

        self.q = normal(*lead, heads[0], 16)
        self.k, self.v = normal(*lead, heads[1], 16), normal(*lead, heads[1], 24)
        self.dout = normal(*lead, heads[0], 24)
        self.dlse = torch.randn(*lead[:-1], heads[0], length, generator=draw)
        self.parameters = {
            name: torch.randn(heads[0], generator=draw)
            for name in ("sink", "score_bias")
            if options.get(name) is True
        }
        self.options = {n: x for n, x in options.items() if n not in self.parameters}
        self.ends = torch.tensor(packed, dtype=torch.int32) if packed else None
        self.statistic = has_statistic(options)

    def run(self, attention, cut, dtype=None, **how):
        """Returns out, lse and gradients of the tokens that cut(x, dim) selects."""
        tokens = self.q.dim() - 3
        leaves = [cut(x, tokens).to(dtype).detach().requires_grad_() if dtype else
                  cut(x, tokens).detach().clone().requires_grad_()
                  for x in (self.q, self.k, self.v)]  # fmt: skip
        parameters = {n: x.clone().requires_grad_() for n, x in self.parameters.items()}
        found = attention(*leaves, return_lse=self.statistic, **self.options, **parameters, **how)
        out, lse = found if self.statistic else (found, None)
        loss = (out * cut(self.dout, tokens).to(out.dtype)).sum()
        if lse is not None:
            loss = loss + (lse * cut(self.dlse, self.dlse.dim() - 1)).sum()
        loss.backward()
        grads = {n: x.grad for n, x in zip("qkv", leaves, strict=True)}
        grads |= {n: x.grad for n, x in parameters.items()}
        return {"out": out.detach(), **({} if lse is None else {"lse": lse.detach()}), **grads}


def whole(x, dim):
    return x


def on_a_rank(lengths, names, schedules, orders, dtype, heads):
    """Maximum error of each result against one process, as a multiple of the allowed error."""
    worst = []
    for length, name, order in itertools.product(lengths, names, orders):
        case = Case(length, OPTIONS[name], dtype, heads)
        exact = case.run(tm.attention, whole, torch.float64, backend="reference")
        plain = case.run(tm.attention, whole)

        def cut(x, dim, order=order):
            return tmd.shard_sequence(x, dim=dim, order=order)

        for schedule in schedules:
            found = case.run(tmd.attention, cut, schedule=schedule, order=order, length=length)
            for result, x in found.items():
                want, beside = exact[result], plain[result]
                if result in case.parameters:
                    x = x.clone()
                    dist.all_reduce(x)
                else:
                    dim = want.dim() - 1 if result == "lse" else want.dim() - 3
                    want, beside = cut(want, dim), cut(beside, dim)
                floor = 4 * torch.finfo(dtype).eps * exact[result].abs().max().item()
                allowed = 3 * (beside - want).abs().max().item() + floor if x.numel() else 1.0
                error = (x - want).abs().nan_to_num(0).max().item() if x.numel() else 0.0
                if not error <= allowed or x.dtype != beside.dtype:
                    worst.append((schedule, order, length, name, result, error, allowed))
    return worst


@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_and_gradients_of_one_process(ranks, size):
    heads = (6, 3) if size == 3 else (8, 4)
    args = ((37, 3), tuple(OPTIONS), SCHEDULES, ("contiguous", "zigzag"), torch.float32, heads)
    for found in ranks(size).run(on_a_rank, *args):
        assert not found


def test_bfloat16(ranks):
    names = ("causal", "sigmoid", "relu", "sink")
    args = ((130,), names, SCHEDULES, ("zigzag",), torch.bfloat16, (8, 4))
    for found in ranks(4).run(on_a_rank, *args):
        assert not found


def test_one_key_head_for_all_ranks(ranks):
    args = ((37,), ("causal",), ("ulysses",), ("zigzag",), torch.float32, (4, 1))
    for found in ranks(4).run(on_a_rank, *args):
        assert not found


PACKED = (0, 11, 11, 30, 31, 64, 90)


def packed_on_a_rank(orders, names):
    worst = []
    for name, order in itertools.product(names, orders):
        case = Case(PACKED[-1], OPTIONS[name], packed=PACKED)

        def cut(x, dim, order=order):
            return tmd.shard_sequence(x, dim=dim, order=order)

        plain = case.run(tm.attention, whole, cu_seqlens_q=case.ends)
        for schedule in ("allgather", "ulysses"):
            found = case.run(
                tmd.attention, cut, schedule=schedule, order=order, length=PACKED[-1],
                cu_seqlens=case.ends,
            )  # fmt: skip
            for result, x in found.items():
                want = cut(plain[result], plain[result].dim() - 1 if result == "lse" else 0)
                if not torch.allclose(x, want, rtol=1e-4, atol=1e-5):
                    worst.append((schedule, order, name, result, (x - want).abs().max().item()))
    return worst


def test_packed_sequences_cross_ranks(ranks):
    names = ("softmax", "causal", "window", "causal window", "relu")
    for found in ranks(4).run(packed_on_a_rank, ("contiguous", "zigzag"), names):
        assert not found


def bits_on_a_rank(size):
    """Schedules that have the bits that they promise."""
    case = Case(50, {"causal": True})
    sizes = (20, 30)
    layout = tmd.sequence.layout("test", 50, size, "contiguous", sizes).pieces
    rank = dist.get_rank()
    begin, end = layout[rank][0]

    def cut(x, dim):
        return tmd.shard_sequence(x, dim=dim, sizes=sizes)

    runs = [
        {n: case.run(tmd.attention, cut, schedule=n, sizes=sizes) for n in SCHEDULES}
        for _ in range(10)
    ]
    for other in runs[1:]:
        for schedule, found in other.items():
            for name, x in found.items():
                assert x.equal(runs[0][schedule][name]), (schedule, name)
    plain = case.run(tm.attention, whole)
    for name in ("out", "q", "k", "v"):
        assert runs[0]["ulysses"][name].equal(cut(plain[name], 1)), name
    # The ring: parts computed in one process and merged in order of arrival.
    out = torch.zeros(2, end - begin, 8, 24)
    lse = torch.full((2, 8, end - begin), -torch.inf)
    for step in range(size):
        first, last = layout[(rank - step) % size][0]
        if first > begin or first == last or begin == end:
            continue
        parts = tm.attention(
            case.q[:, begin:end], case.k[:, first:last], case.v[:, first:last],
            causal=first == begin, return_lse=True,
        )  # fmt: skip
        both = [torch.stack(pair) for pair in zip((out, lse), parts, strict=True)]
        out, lse = tm.merge_attention_states(*both)
    assert runs[0]["ring"]["out"].equal(out)
    assert runs[0]["ring"]["lse"].equal(lse)


def test_bits(ranks):
    ranks(2).run(bits_on_a_rank, 2)


def refusals_on_a_rank():
    x = torch.randn(1, 8, 4, 16)
    for text, call in (
        ("schedule: must be 'auto', 'ring', 'allgather' or 'ulysses'; got 'tree'",
         lambda: tmd.attention(x, x, x, schedule="tree")),
        ("order: must be 'contiguous' or 'zigzag'; got 'random'",
         lambda: tmd.attention(x, x, x, order="random")),
        ("q: must have 5 tokens on rank", lambda: tmd.attention(x, x, x, length=10)),
        ("sizes: must be None in zigzag order; got [8, 8]",
         lambda: tmd.attention(x, x, x, order="zigzag", sizes=[8, 8])),
        ("schedule: must be another one: 2 ranks do not divide 3 query heads; got 'ulysses'",
         lambda: tmd.attention(x[:, :, :3], x[:, :, :1], x[:, :, :1], schedule="ulysses")),
        ("mask needs the whole sequence on a rank", lambda: tmd.attention(
            x, x, x, mask=tm.masks.prefix(torch.zeros(1, dtype=torch.int32)))),
        ("k: must have the 8 tokens of q; got 7", lambda: tmd.attention(x, x[:, :7], x[:, :7])),
        ("cu_seqlens: must end at the number of tokens, 16; got 9", lambda: tmd.attention(
            x[0], x[0], x[0], cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))),
        ("window: must be at least -1 on either side; got [-2, 0]",
         lambda: tmd.attention(x, x, x, window=(-2, 0))),
        ("softcap: must be", lambda: tmd.attention(x, x, x, softcap=-1.0, schedule="ring")),
        ("backend: must be one of", lambda: tmd.attention(x, x, x, backend="gpu")),
        ("sink: must have", lambda: tmd.attention(x, x, x, sink=torch.zeros(3))),
        ("mesh: must be a torch.distributed.device_mesh.DeviceMesh; got 3",
         lambda: tmd.attention(x, x, x, mesh=3)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError) as error:
            call()
        assert text in str(error.value), error.value


def test_bad_calls_are_refused_before_anything_is_sent(ranks):
    ranks(2).run(refusals_on_a_rank)


DIFFERENT = {
    "window": lambda x, r: tmd.attention(x, x, x, window=(r, 0), causal=True),
    "order": lambda x, r: tmd.attention(x, x, x, order=("zigzag", "contiguous")[r]),
    "scale": lambda x, r: tmd.attention(x, x, x, scale=0.5 + r),
    "softcap": lambda x, r: tmd.attention(x, x, x, softcap=1.0 + r),
    "sink": lambda x, r: tmd.attention(x, x, x, sink=(None, torch.zeros(4))[r]),
    "score_bias": lambda x, r: tmd.attention(x, x, x, kind="sigmoid", score_bias=float(r)),
    "schedule": lambda x, r: tmd.attention(x, x, x, schedule=("ring", "allgather")[r]),
    "dtype": lambda x, r: tmd.attention(*[x.to((x.dtype, torch.bfloat16)[r])] * 3),
    "heads": lambda x, r: tmd.attention(*[x[:, :, : 4 - 2 * r]] * 3),
    "tokens": lambda x, r: tmd.attention(*[x[:, : 8 - r]] * 3),
    "requires_grad": lambda x, r: tmd.attention(x.clone().requires_grad_(r == 0), x, x),
    "cu_seqlens": lambda x, r: tmd.attention(
        *[x[0]] * 3, cu_seqlens=torch.tensor([0, 3 + r, 16], dtype=torch.int32)
    ),
    "operator": lambda x, r: (tmd.attention, tmd.linear_attention)[r](x, x, x),
}


def differences_on_a_rank():
    x, found = torch.randn(1, 8, 4, 16), {}
    for name, call in DIFFERENT.items():
        try:
            call(x, dist.get_rank())
            found[name] = "no error"
        except RuntimeError as error:
            found[name] = str(error)
    return found


def test_ranks_that_differ_all_say_in_what(ranks):
    for rank, found in enumerate(ranks(2).run(differences_on_a_rank)):
        for name, text in found.items():
            rule = rf"attention: {name}: must be that of rank {1 - rank} in group '\w*'"
            assert re.search(rule, text), (name, text)


def test_without_a_group():
    x = torch.randn(1, 8, 4, 16)
    with pytest.raises(RuntimeError, match=r"group: needs torch\.distributed\.init_process_group"):
        tmd.attention(x, x, x)


def dies_on_a_rank(collectives):
    """Rank 1 of 3 exits within a ring; the other ranks report it."""
    x = torch.randn(1, 8, 4, 16, requires_grad=True)
    out = tmd.attention(x, x, x, schedule="ring")
    if dist.get_rank() == 1:
        os._exit(1)
    try:
        (
            out if collectives == "backward" else tmd.attention(x, x, x, schedule="ring")
        ).sum().backward()
    except tmd.PeerError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("collectives", ["forward", "backward"])
def test_a_rank_that_dies_is_an_error_on_the_others(collectives):
    group = Ranks(3, timeout=20)
    found = group.run(dies_on_a_rank, collectives, survivors=True)
    group.close()
    assert found[1] == "the process died"
    for rank in (0, 2):
        assert f"tokenmill.distributed.attention: group: rank {rank} of 3 in group" in found[rank]
