"""attention over sharded sequences: results and gradients of one process, whatever the schedule,
the order and the sizes of shards, and the same bits on every run."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

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
        """out, lse and gradients, of the tokens that cut(x, dim) leaves."""
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
    """The largest error of each result beside that of one process, as multiples of the allowed."""
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
