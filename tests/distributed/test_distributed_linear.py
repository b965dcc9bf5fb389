"""linear_attention over sharded sequences: results and gradients of one process, for any shard
sizes and bounds of packed sequences, and the bits of the same parts in one process."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import refusals

import tokenmill as tm
import tokenmill.distributed as tmd
from tokenmill.testing import (
    FORWARD_FACTOR,
    FORWARD_FLOOR,
    GRADIENT_FACTOR,
    GRADIENT_FLOOR,
    error,
)

INF = float("inf")
CALLS = {
    "no decay": {},
    "constant": {"decay": "constant", "initial": True},
    "gates": {"decay": "gates"},
    "gates of channels": {"decay": "channels", "initial": True},
    "gates from a state": {"decay": "gates", "initial": True, "normalize": True, "map": "elu1"},
    "relu": {"map": "relu", "normalize": True},
    "silu": {"map": "silu", "initial": True, "scale": 0.3, "chunk_size": 16},
    "taylor2": {"map": "taylor2", "decay": "constant", "normalize": True, "initial": True},
    "forgets": {"decay": "forgets", "initial": True},
    "forgets at once": {"decay": "constant", "minimum": -INF, "initial": True},
}
# Lengths, and ends of packed sequences: across ranks, on bounds of 2, 3 and 4 shards, empty.
WHOLES = (
    (37, ()),
    (3, ()),
    (37, (0, 37)),
    (37, (0, 0, 5, 30, 31, 31, 37)),
    (37, (0, 10, 13, 13, 19, 25, 28, 37, 37)),
    (3, (0, 2, 3, 3)),
)
LOSSES = ("out", "state", "both")


class Case:
    """A call on a whole sequence, the same on every rank."""

    def __init__(self, name, length, ends=(), dtype=torch.float32, dims=(6, 5)):
        call = CALLS[name]
        draw = torch.Generator().manual_seed(length + len(ends))
        lead = (length,) if ends else (2, length)
        self.dim = len(lead) - 1
        heads, kv_heads = 4, 2
        normalize, decay = call.get("normalize", False), call.get("decay")

        def normal(*shape):
            return torch.randn(shape, generator=draw)

        shapes = ((heads, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]))
        self.tokens = {
            n: normal(*lead, *shape).to(dtype) for n, shape in zip("qkv", shapes, strict=True)
        }
        self.dout = normal(*lead, heads, dims[1])
        self.replicated = {}
        if decay == "constant":
            self.replicated["log_decay"] = -torch.rand(heads, generator=draw) / 4
            self.replicated["log_decay"][0] = call.get("minimum", -1e-3)
        elif decay:
            channels = dims[:1] if decay == "channels" else ()
            gates = -torch.rand(*lead, heads, *channels, generator=draw) / 4
            if decay == "forgets":
                gates[torch.rand(gates.shape, generator=draw) < 0.1] = -INF
            self.tokens["log_decay"] = gates
        taylor = call.get("map") == "taylor2"
        features = 1 + dims[0] + dims[0] * (dims[0] + 1) // 2 if taylor else dims[0]
        state = len(ends) - 1 if ends else 2, heads, features, dims[1] + normalize
        self.dstate = normal(*state)
        if call.get("initial"):
            before = normal(*state)
            self.replicated["initial_state"] = before.abs() if normalize else before
        self.options = {"feature_map": call.get("map", "identity"), "normalize": normalize}
        self.options |= {n: call[n] for n in ("scale", "chunk_size") if n in call}
        self.ends = torch.tensor(ends, dtype=torch.int32) if ends else None

    def run(self, attention, cut=None, loss="both", share=1.0, dtype=None, wanted=None, **how):
        """Returns out, state and gradients of the tokens that cut(x, dim) selects. The loss of the
        state is weighted by share."""
        cut = cut or (lambda x, dim: x)
        given = {n: cut(x, self.dim) for n, x in self.tokens.items()} | self.replicated
        given = {n: x.detach().to(dtype or x.dtype, copy=True) for n, x in given.items()}
        leaves = {n: x.requires_grad_() for n, x in given.items() if not wanted or n in wanted}
        q, k, v = (given.pop(n) for n in "qkv")
        out, state = attention(
            q, k, v, cu_seqlens=self.ends, return_final_state=True, **given, **self.options, **how
        )
        total = out.new_zeros((), dtype=torch.float64)
        if loss != "state":
            total = total + (out.double() * cut(self.dout, self.dim).double()).sum()
        if loss != "out":
            total = total + share * (state.double() * self.dstate.double()).sum()
        if total.requires_grad:
            total.backward()
        self.without = [n for n, x in leaves.items() if x.grad is None]
        grads = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
        return {"out": out.detach(), "state": state.detach(), **grads}


def wide(dtype):
    """Dtype that other tensors are converted to: everything is float64 with float64."""
    return dtype if dtype == torch.float64 else None


@functools.cache
def in_one_process(*args):
    """Exact results of a case, allowed errors, and dtypes."""
    *of, dtype, loss = args
    case = Case(*of, dtype)
    exact = case.run(tm.linear_attention, loss=loss, dtype=torch.float64, backend="reference")
    plain = case.run(tm.linear_attention, loss=loss, dtype=wide(dtype))
    allowed = {}
    for name, x in plain.items():
        forward = name in ("out", "state")
        factor, floors = FORWARD_FACTOR, FORWARD_FLOOR
        if not forward:
            factor, floors = GRADIENT_FACTOR, GRADIENT_FLOOR
        allowed[name] = factor * error(x, exact[name]) + 2 * floors[dtype]
    return exact, allowed, {n: x.dtype for n, x in plain.items()}


def cases(names, wholes, layouts, dtype=torch.float32):
    """Assigns a loss to each case."""
    found = itertools.product(names, wholes, layouts)
    return [(*case, dtype, LOSSES[n % 3]) for n, case in enumerate(found)]


def sizes_of(layout, length, ranks):
    """Tokens of each rank: an equal split, all on rank 1, or all but one token on rank 1 and that
    token on the last rank."""
    if layout == "equal":
        return None
    sizes = [0] * ranks
    sizes[1] = length
    if layout == "ragged":
        sizes[1] -= 1
        sizes[-1] += 1
    return sizes


def on_a_rank(cases):
    rank, size = dist.get_rank(), dist.get_world_size()
    found = []
    for name, (length, ends), layout, dtype, loss in cases:
        sizes = sizes_of(layout, length, size)

        def cut(x, dim, sizes=sizes):
            return tmd.shard_sequence(x, dim=dim, sizes=sizes)

        share = (rank + 1) * 2 / (size * (size + 1))
        case = Case(name, length, ends, dtype)
        got = case.run(
            tmd.linear_attention, cut, loss, share, wide(dtype), length=length, sizes=sizes
        )
        found.append({n: (x.dtype, x.double().numpy()) for n, x in got.items()})
    return found


def check(ranks, size, cases):
    wrong = []
    for case, *results in zip(cases, *ranks(size).run(on_a_rank, cases), strict=True):
        name, (length, ends), _, dtype, loss = case
        exact, allowed, dtypes = in_one_process(name, length, ends, dtype, loss)
        replicated = Case(name, length, ends).replicated
        for result, want in exact.items():
            parts = [torch.from_numpy(found[result][1]) for found in results]
            if result in replicated:
                parts = [sum(parts)]
            elif result != "state":
                parts = [torch.cat(parts, 0 if ends else 1)]
            for x in parts:
                e = error(x, want)
                if not e <= allowed[result]:
                    wrong.append((case, result, e, allowed[result]))
            if any(found[result][0] != dtypes[result] for found in results):
                wrong.append((case, result, "dtype"))
    assert not wrong


@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_and_gradients_of_one_process(ranks, size):
    check(ranks, size, cases(CALLS, WHOLES, ("equal",)))


def test_any_sizes_of_shards(ranks):
    names = ("no decay", "constant", "gates from a state", "forgets at once")
    check(ranks, 4, cases(names, WHOLES[:4], ("one", "ragged")))


def test_no_tokens_at_all(ranks):
    names = ("constant", "gates from a state")
    check(ranks, 3, cases(names, ((0, ()), (0, (0,)), (0, (0, 0, 0))), ("equal",)))


def test_other_dtypes(ranks):
    names = ("constant", "gates from a state", "relu", "forgets")
    wholes = ((130, ()), (130, (0, 20, 100, 130)))
    check(ranks, 4, cases(names, wholes, ("equal",), torch.bfloat16))
    check(ranks, 2, cases(("taylor2", "gates"), WHOLES[:4], ("equal",), torch.float64))


def two_levels(case, sizes):
    """Computes the parts of the ranks in one process: out, final state."""
    q, k, v = (case.tokens[n] for n in "qkv")
    decay = {**case.tokens, **case.replicated}.get("log_decay")
    first = case.replicated.get("initial_state")
    rows = case.ends.tolist() if case.ends is not None else [0, q.shape[1]]
    if case.ends is not None:
        q, k, v = (t[None] for t in (q, k, v))
        decay = decay[None] if decay is not None and decay.dim() > 1 else decay
    borders = [0, *itertools.accumulate(sizes)]
    outs, finals = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(rows)):
        state = None
        if first is not None:
            state = first if case.ends is None else first[n : n + 1]
        last = None
        for a, b in itertools.pairwise(borders):
            a, b = max(a, begin), min(b, end)
            if a >= b:
                continue
            gates = decay is not None and decay.dim() > 1
            part = {"log_decay": decay[:, a:b] if gates else decay, **case.options}
            part["return_final_state"] = True
            keys, values = k[:, a:b], v[:, a:b]
            out, last = tm.linear_attention(q[:, a:b], keys, values, initial_state=state, **part)
            outs.append(out)
            # A state does not depend on queries.
            _, alone = tm.linear_attention(q[:, a:b], keys, values, **part)
            if state is None:
                state = alone
            elif decay is None:
                state = state + alone
            else:
                total = decay[:, a:b].double().sum(1).float() if gates else (b - a) * decay
                factor = total.exp()[..., None]
                state = state * (factor if factor.dim() == 4 else factor[..., None]) + alone
        finals.append(state if case.ends is None else last)
    out = torch.cat(outs, 1)
    return (out, finals[0]) if case.ends is None else (out[0], torch.cat(finals))


def bits_on_a_rank(length, ends, sizes):
    def cut(x, dim):
        return tmd.shard_sequence(x, dim=dim, sizes=sizes)

    wrong = []
    for name in CALLS:
        case = Case(name, length, ends, torch.float32, (16, 16))
        first, *others = (case.run(tmd.linear_attention, cut, sizes=sizes) for _ in range(10))
        wrong += [(name, n) for other in others for n, x in first.items() if not x.equal(other[n])]
        out, state = two_levels(case, sizes)
        if not torch.equal(first["out"], cut(out, case.dim)):
            wrong.append((name, "out"))
        if not torch.equal(first["state"], state):
            wrong.append((name, "state"))
    return wrong


@pytest.mark.parametrize("ends", [(), (0, 20, 90, 133, 150)], ids=["sequences", "packed"])
def test_the_bits_of_the_same_parts_in_one_process(ranks, ends):
    for wrong in ranks(3).run(bits_on_a_rank, 150, ends, (70, 31, 49)):
        assert not wrong


def one_gradient_on_a_rank(ends, backend):
    """The gradient of a single tensor equals the gradient taken together with all others."""
    dtype = torch.float64 if backend == "reference" else None
    sizes = (0, 7, 0)

    def cut(x, dim):
        return tmd.shard_sequence(x, dim=dim, sizes=sizes)

    wrong = []
    for name, loss in itertools.product(("constant", "gates from a state"), LOSSES):
        case = Case(name, 7, ends)
        how = {"loss": loss, "sizes": sizes, "dtype": dtype}
        together = case.run(tmd.linear_attention, cut, **how)
        if loss != "state" and case.without:
            wrong.append((name, loss, "no gradient", case.without))
        for leaf in {**case.tokens, **case.replicated}:
            found = case.run(tmd.linear_attention, cut, wanted=(leaf,), **how)
            if not error(found[leaf], together[leaf]) < 1e-5:
                wrong.append((name, loss, leaf))
    return wrong


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ends", [(), (0, 3, 3, 7)], ids=["sequences", "packed"])
def test_ranks_without_tokens_take_part_in_any_gradient(ranks, ends, backend):
    for wrong in ranks(3).run(one_gradient_on_a_rank, ends, backend):
        assert not wrong


def forms_on_a_rank():
    """lightning_attention, decode, out=, autocast and a group of one rank, against the plain
    forms."""
    rank = dist.get_rank()
    wrong = []
    case = Case("constant", 20)
    cut = [tmd.shard_sequence(case.tokens[n]) for n in "qkv"]
    slopes = -case.replicated["log_decay"]
    want = tmd.linear_attention(*cut, log_decay=-slopes, scale=1.0)
    if not torch.equal(tmd.lightning_attention(*cut, slopes), want):
        wrong.append("lightning")
    _, state = tmd.linear_attention(*cut, return_final_state=True)
    heads = state[:, 2:].contiguous()
    q, k, v = (t[:, :1] for t in cut)
    want = tm.linear_attention_decode(q, k, v, state)[:, :, 2:]
    found = tm.linear_attention_decode(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], heads)
    if not (torch.equal(found, want) and torch.equal(heads, state[:, 2:])):
        wrong.append("decode of some heads")
    for ends in ((), (0, 3, 12, 20)):
        case = Case("gates", 20, ends)
        given = [tmd.shard_sequence(x, dim=case.dim) for x in case.tokens.values()]
        given, gates = given[:3], given[3]
        how = {"log_decay": gates, "cu_seqlens": case.ends}
        want = tmd.linear_attention(*given, **how)
        into = torch.full_like(want, torch.nan)
        if tmd.linear_attention(*given, **how, out=into).data_ptr() != into.data_ptr():
            wrong.append("out")
        if not torch.equal(into, want):
            wrong.append("bits of out")
        with torch.autocast("cpu", torch.bfloat16):
            found = tmd.linear_attention(*given, **how)
        if not torch.equal(found, tmd.linear_attention(*(x.bfloat16() for x in given), **how)):
            wrong.append("autocast")
        alone = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
        q, k, v, log_decay = case.tokens.values()
        how = {"log_decay": log_decay, "cu_seqlens": case.ends, "return_final_state": True}
        both = (
            tmd.linear_attention(q, k, v, group=alone, **how),
            tm.linear_attention(q, k, v, **how),
        )
        if not all(torch.equal(a, b) for a, b in zip(*both, strict=True)):
            wrong.append("alone")
    return wrong


def test_other_forms_of_the_call(ranks):
    for wrong in ranks(2).run(forms_on_a_rank):
        assert not wrong


def errors_on_a_rank():
    x, rank = torch.zeros(1, 4, 2, 8), dist.get_rank()
    calls = [
        lambda: tmd.linear_attention(x, x, x, order="zigzag"),
        lambda: tmd.linear_attention(x, x, x, initial_state=torch.zeros(1, 2, 8, 4)),
        lambda: tmd.linear_attention(x, x, x, log_decay=torch.ones(2)),
        lambda: tmd.linear_attention(x, x, x, length=5),
        lambda: tmd.linear_attention(
            *[x[0]] * 3, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32)
        ),
        lambda: tmd.lightning_attention(x, x, x, torch.tensor([0.5, -1.0])),
    ]
    found = refusals(calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENMILL_CHECK", "1")
        differ = {"feature_map": ("relu", "silu")[rank]}
        return found + refusals([lambda: tmd.linear_attention(x, x, x, **differ)])


def test_errors_name_argument_rule_and_value(ranks):
    rules = (
        "distributed.linear_attention: order: must be 'contiguous': the state goes from a token",
        "linear_attention: initial_state: must have shape [1, 2, 8, 8]",
        "distributed.linear_attention: log_decay: must not be positive; largest; got 1",
        "distributed.linear_attention: q: must have 3 tokens on rank 0 of 2, of 5; got 4",
        "distributed.linear_attention: cu_seqlens: must end at the number of tokens, 8; got 7",
        "distributed.lightning_attention: slopes: must not be negative; least; got -1",
        "distributed.linear_attention: feature_map: must be that of rank 1 in group",
    )
    for found, rule in zip(ranks(2).run(errors_on_a_rank)[0], rules, strict=True):
        assert f"tokenmill.{rule}" in found
