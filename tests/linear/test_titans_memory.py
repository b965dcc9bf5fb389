"""Properties of titans_memory and titans_memory_decode."""

from __future__ import annotations

import importlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tier import examples
from titans_oracle import GATES, draw, recurrence

import tokenmill as tm
from tokenmill.testing import assert_accurate

CHUNKS = importlib.import_module("tokenmill.linear.titans_chunks")
MEMORY = importlib.import_module("tokenmill.linear.titans_memory")


def run(q, k, v, alpha, eta, theta, *state, **options):
    """out, memory and momentum."""
    out, final = tm.titans_memory(
        q, k, v, alpha=alpha, eta=eta, theta=theta, initial_state=state or None,
        return_final_state=True, **options,
    )  # fmt: skip
    return out, *final


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def same(found, wanted, leaves, tolerance=1e-11):
    """The results, and the gradients of one combination of them."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in wanted]
    grads = [torch.autograd.grad(ts, leaves, weights) for ts in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@examples(30)
@given(
    length=st.integers(1, 40), chunk=st.integers(1, 50), batch=st.integers(1, 2),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    elements=st.sampled_from([1, 400, 2**18]), begun=st.booleans(),
)  # fmt: skip
def test_is_the_recurrence_at_any_length_and_chunk_size(
    length, chunk, batch, sizes, elements, begun
):
    heads, d, dv = sizes
    given = draw(batch, length, heads=heads, d=d, dv=dv, states=batch)
    given = given if begun else given[:6]
    before, CHUNKS.CPU_ELEMENTS = CHUNKS.CPU_ELEMENTS, elements  # blocks of few chunks
    try:
        found = run(*given, chunk_size=chunk)
        same(found, recurrence(*given, chunk=chunk), given)
        with torch.no_grad():  # keeps the states of no chunk
            torch.testing.assert_close(run(*given, chunk_size=chunk), found, rtol=0, atol=0)
    finally:
        CHUNKS.CPU_ELEMENTS = before


@pytest.mark.parametrize("gates", [(1, 1, 1), (0, 0, 0), (1, 0, 1), (0, 1, 0), (0, 0, 0.5)])
def test_gates_at_their_ends_are_exact(gates):
    given = draw(2, 11)
    with torch.no_grad():
        for gate, value in zip(given[3:6], gates, strict=True):
            gate.fill_(value)
    same(run(*given, chunk_size=4), recurrence(*given, chunk=4), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_error_budget(dtype):
    given = draw(1, 150, d=16, dv=16, states=1, dtype=torch.float32)[:6]
    with torch.no_grad():
        given[3].mul_(0.05)
        given[5].mul_(0.1)
    lowered = [t.detach().to(dtype if i < 3 else t.dtype) for i, t in enumerate(given)]
    results = []
    for function, wide in ((tm.titans_memory, None), (recurrence, None), (recurrence, float)):
        leaves = [t.double() if wide else t.clone() for t in lowered]
        leaves = [t.requires_grad_() for t in leaves]
        if function is recurrence:
            # Rounded to the dtype of q behind each token
            gates = [g.to(leaves[0].dtype) for g in leaves[3:]]
            out = recurrence(*leaves[:3], *gates, chunk=64)[0]
        else:
            out = function(*leaves[:3], **dict(zip(GATES, leaves[3:], strict=True)))
        weight = torch.linspace(0.5, 1.5, out.numel()).view_as(out).to(out)
        results.append([out, *torch.autograd.grad(out, leaves, weight)])
    for i, (found, plain, exact) in enumerate(zip(*results, strict=True)):
        assert_accurate(found, exact, plain, gradient=i > 0)


PACKED = (0, 4, 4, 11, 12)


@pytest.mark.parametrize("read", [True, False], ids=["read", "as on a GPU"])
def test_packed_sequences_are_apart(read, monkeypatch):
    if not read:
        monkeypatch.setattr(MEMORY, "reads_values", lambda t: False)
    *tensors, memory, momentum = given = draw(12, states=4)
    wanted = [
        recurrence(
            *(t[None, begin:end] for t in tensors), memory[i, None], momentum[i, None], chunk=3
        )
        for i, (begin, end) in enumerate(pairwise(PACKED))
    ]
    out, *states = zip(*wanted, strict=True)
    wanted = torch.cat(out, 1)[0], *(torch.cat(s) for s in states)
    found = run(*given, chunk_size=3, cu_seqlens=i32(*PACKED))
    same(found, wanted, given)
    del found
    with torch.no_grad():
        for t in (*tensors, memory, momentum):
            (t[4:11] if t.shape[0] == 12 else t[2]).fill_(torch.nan)
    found = run(*given, chunk_size=3, cu_seqlens=i32(*PACKED))
    for a, b in zip(found, wanted, strict=True):
        rows = [i for i in range(len(a)) if not (4 <= i < 11 if len(a) == 12 else i == 2)]
        torch.testing.assert_close(a[rows], b[rows])
    for t, grad in zip(given, torch.autograd.grad([f.sum() for f in found], given), strict=True):
        rows = [i for i in range(len(t)) if not (4 <= i < 11 if len(t) == 12 else i == 2)]
        assert grad[rows].isfinite().all()


def test_tokens_of_no_sequence_have_results_and_gradients_0(monkeypatch):
    """Where the values of cu_seqlens are not read, and whatever they are."""
    monkeypatch.setattr(MEMORY, "reads_values", lambda t: False)
    given = draw(12, states=2)
    with torch.no_grad():
        given[2][:2] = torch.nan
    out, *_ = run(*given, chunk_size=3, cu_seqlens=i32(2, 5, 9))
    inside = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.arange(2, 9), True)
    assert not out[~inside].any() and (out[inside] != 0).all()
    for grad in torch.autograd.grad(out.sum(), given[:6]):
        assert not grad[~inside].any() and grad[inside].isfinite().all()
    assert torch.isfinite(run(*given[:6], chunk_size=3, cu_seqlens=i32(2, 90, -4))[0]).all()
    assert not run(*given[:6], chunk_size=3, cu_seqlens=i32(7))[0].any()


def test_batches_are_apart():
    given = draw(3, 11, states=3)
    wanted = run(*given, chunk_size=4)
    with torch.no_grad():
        given[1][1, 5] = torch.nan
    for a, b in zip(run(*given, chunk_size=4), wanted, strict=True):
        assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
def test_derivatives_of_both_orders(packed):
    lead, options = ((5,), {"cu_seqlens": i32(0, 3, 5)}) if packed else ((2, 3), {})
    given = draw(*lead, heads=1, d=2, dv=2)

    def function(*tensors):
        return run(*tensors, chunk_size=2, **options)

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


def test_transforms_and_compilation():
    q, k, v, alpha, eta, theta = (t.detach() for t in draw(2, 9)[:6])

    def call(keys):
        return tm.titans_memory(q, keys, v, alpha=alpha, eta=eta, theta=theta, chunk_size=4)

    def loss(keys):
        return call(keys).square().sum()

    leaf = k.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(k), wanted)
    many = torch.stack([2 * k, k])
    torch.testing.assert_close(torch.func.vmap(call)(many)[1], call(k))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many)[1], wanted)
    for i, t in enumerate(inputs := (q, k, v, alpha, eta, theta)):  # each batched alone

        def loss_of(x, i=i):
            return sum(r.square().sum() for r in run(*inputs[:i], x, *inputs[i + 1 :]))

        found = torch.func.vmap(torch.func.grad(loss_of))(torch.stack([2 * t, t]))[1]
        torch.testing.assert_close(found, torch.func.grad(loss_of)(t))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    dense = [t[:, :3] for t in (q, k, v, alpha, eta, theta)]
    for tensors, cu_seqlens in ((dense, None), ([t[0] for t in dense], i32(0, 2, 3))):
        torch._dynamo.reset()  # else the second graph has symbolic sizes, which take longest
        options = {"chunk_size": 2, "cu_seqlens": cu_seqlens}
        for a, b in zip(compiled(*tensors, **options), run(*tensors, **options), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_lowers_queries_keys_and_values():
    q, k, v, *gates = (t.detach().float() for t in draw(1, 9)[:6])
    options = dict(zip(GATES, gates, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tm.titans_memory(q, k, v, **options)
    wanted = tm.titans_memory(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)


def test_empty_calls():
    for lead, heads in (((2, 0), 2), ((0, 5), 2), ((2, 5), 0)):
        given = draw(*lead, heads=heads, states=lead[0])
        out, memory, momentum = run(*given)
        assert out.shape == (*lead, heads, 4)
        torch.testing.assert_close((memory, momentum), (*given[6:],))
        out.sum().backward()
    given = draw(0, states=2)
    out, *state = run(*given, cu_seqlens=i32(0, 0, 0))
    assert out.shape == (0, 2, 4) and all(
        torch.equal(a, b) for a, b in zip(state, given[6:], strict=True)
    )


# Decode.


def states(slots, heads=2, d=3, dv=4, dtype=torch.float64):
    found = [torch.zeros(slots, heads, d, dv, dtype=dtype) for _ in range(3)]
    return *found, torch.zeros(slots, dtype=torch.int32)


@examples(20)
@given(
    steps=st.lists(st.integers(0, 5), min_size=1, max_size=5), chunk=st.integers(1, 7),
    order=st.one_of(st.none(), st.permutations(range(4))),
)  # fmt: skip
@torch.no_grad()
def test_decode_is_titans_memory_token_by_token(steps, chunk, order):
    total = sum(steps)
    given = [t.detach() for t in draw(3, total)[:6]]
    table = states(4)
    for t in table[:3]:  # not read where nothing is filled
        t[3] = torch.nan if order is None else t[3]
    table[0].fill_(torch.nan)
    slots = None if order is None else i32(*order[:3])
    outs, begin = [], 0
    for step in steps:
        q, k, v, *gates = (t[:, begin : begin + step] for t in given)
        options = dict(zip(GATES, gates, strict=True))
        outs.append(
            tm.titans_memory_decode(
                q, k, v, *table, **options, chunk_size=chunk, state_indices=slots
            )
        )
        begin += step
    out, memory, momentum = run(*given, chunk_size=chunk)
    torch.testing.assert_close(torch.cat(outs, 1), out)
    rows = slice(3) if slots is None else slots.long()
    torch.testing.assert_close(table[1][rows], memory)
    torch.testing.assert_close(table[2][rows], momentum)
    assert table[3][rows].tolist() == [total % chunk] * 3


@torch.no_grad()
def test_decode_skips_and_goes_on_from_a_prompt():
    given = [t.detach() for t in draw(2, 14)[:6]]
    wanted, memory, momentum = run(*given, chunk_size=4)
    table = states(3)
    _, table[1][1], table[2][1] = run(*(t[1:, :8] for t in given), chunk_size=4)
    kept = [t.clone() for t in table]
    for t in range(8, 14):
        q, k, v, *gates = (x[:, t : t + 1] for x in given)
        out = tm.titans_memory_decode(
            q, k, v, *table, **dict(zip(GATES, gates, strict=True)), chunk_size=4,
            state_indices=i32(-1, 1),
        )  # fmt: skip
        assert not out[0].any()
        torch.testing.assert_close(out[1:], wanted[1:, t : t + 1])
    torch.testing.assert_close((table[1][1], table[2][1]), (memory[1], momentum[1]))
    for now, before in zip(table, kept, strict=True):
        assert torch.equal(now[::2], before[::2])
    kept = [t.clone() for t in table]
    options = dict(zip(GATES, gates, strict=True))
    out = tm.titans_memory_decode(
        q, k, v, *table, **options, chunk_size=4, state_indices=i32(-1, -1)
    )
    assert not out.any() and all(torch.equal(a, b) for a, b in zip(table, kept, strict=True))


@torch.no_grad()
def test_decode_compiles():
    q, k, v, *gates = (t.detach() for t in draw(2, 3)[:6])
    torch._dynamo.reset()
    tables = states(3), states(3)
    compiled = torch.compile(tm.titans_memory_decode, fullgraph=True, backend="aot_eager")
    for function, table in zip((compiled, tm.titans_memory_decode), tables, strict=True):
        out = function(
            q, k, v, *table, **dict(zip(GATES, gates, strict=True)), chunk_size=2,
            state_indices=i32(2, -1),
        )  # fmt: skip
        assert out[0].any()
    for a, b in zip(*tables, strict=True):
        torch.testing.assert_close(a, b)


Z = torch.zeros


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"q": Z(2, 5, 3)}, r"q: must have 4 dimensions \[B, S, H, D\]; got 3"),
        ({"q": Z(2, 5, 2, 3).int()}, "q: must be float16, bfloat16 or float32; got int32"),
        ({"k": Z(2, 5, 2, 3).half()}, "k: must have the dtype of q, float32; got float16"),
        ({"k": Z(2, 5, 1, 3)}, r"k: must have the shape of q, \[2, 5, 2, 3\]; got \[2, 5, 1, 3\]"),
        ({"v": Z(2, 4, 2, 3)}, r"v: must have the shape of q up to .*; got \[2, 4, 2, 3\]"),
        ({"v": Z(2, 5, 2, 0)}, "v: must have a head dimension of at least 1; got 0"),
        ({"alpha": Z(2, 5)}, r"alpha: must have shape \[2, 5, 2\]; got \[2, 5\]"),
        ({"eta": 0.5}, "eta: must be a tensor; got 0.5"),
        ({"theta": Z(2, 5, 2).int()}, "theta: must be a floating-point tensor; got int32"),
        ({"chunk_size": 0}, "chunk_size: must be at least 1; got 0"),
        ({"chunk_size": None}, "chunk_size: must be an integer; got None"),
        ({"loss": "l1"}, "loss: must be 'mse'; got 'l1'"),
        ({"initial_state": Z(2)}, r"initial_state: must be a pair of tensors \(M, S\) or None.*"),
        ({"initial_state": (Z(2, 2, 3, 4),) * 2}, r"initial_state: must have shape \[2, 2, 3, 3.*"),
        ({"initial_state": (Z(2, 2, 3, 3).half(),) * 2}, "initial_state: must be float32; got .*"),
        ({"return_final_state": 1}, "return_final_state: must be a bool; got 1"),
    ],
)  # fmt: skip
def test_bad_input(edits, says):
    call = dict.fromkeys(("q", "k", "v"), Z(2, 5, 2, 3)) | dict.fromkeys(GATES, Z(2, 5, 2)) | edits
    with pytest.raises(RuntimeError, match=f"^tokenmill.titans_memory: {says}$"):
        tm.titans_memory(**call)


def test_bad_packing():
    call = dict.fromkeys(("q", "k", "v"), Z(5, 2, 3)) | dict.fromkeys(GATES, Z(5, 2))
    for cu, says in (
        (i32(0, 4), "must end at the number of tokens, 5; got 4"),
        (i32(0, 4, 3, 5), "must not decrease; got .*"),
        (i32(0, 5).long(), "must be int32; got int64"),
    ):
        with pytest.raises(RuntimeError, match=f"^tokenmill.titans_memory: cu_seqlens: {says}$"):
            tm.titans_memory(**call, cu_seqlens=cu)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"memory": Z(4, 2, 3, 5)}, r"memory: must have shape \[slots, 2, 3, 4\]; got .*"),
        ({"memory": Z(3, 2, 3, 4)}, "memory: must have the slots of start, 4; got 3"),
        ({"momentum": Z(4, 2, 3, 4).half()}, "momentum: must be float32; got float16"),
        ({"filled": Z(4)}, "filled: must be int32; got float32"),
        ({"filled": i32(0, 1, 0)}, r"filled: must have shape \[4\]; got \[3\]"),
        ({"filled": i32(0, 64, 0, 0)}, "filled: must be 0 to 63; got 64"),
        ({"start": Z(1, 2, 3, 4), "memory": Z(1, 2, 3, 4), "momentum": Z(1, 2, 3, 4),
          "filled": i32(0)}, "start: must have a slot for each sequence, 2, without .*; got 1"),
        ({"state_indices": i32(1, 1)}, r"state_indices: must not repeat a slot; got \[1, 1\]"),
        ({"state_indices": i32(1, 4)}, r"state_indices: must be -1 .* below 4; got 4"),
        ({"v": Z(2, 1, 2, 4).requires_grad_()}, "v: must not require a gradient.*; got True"),
        ({"memory": Z(1, 2, 3, 4).expand(4, -1, -1, -1)}, "memory: must have each element at .*"),
    ],
)  # fmt: skip
def test_bad_decode(edits, says):
    table = dict(zip(("start", "memory", "momentum", "filled"), states(4), strict=True))
    table = {n: t.float() if t.dim() > 1 else t for n, t in table.items()}
    q, v = Z(2, 1, 2, 3), Z(2, 1, 2, 4)
    call = {"q": q, "k": q, "v": v, **table, **dict.fromkeys(GATES, Z(2, 1, 2)), **edits}
    with pytest.raises(RuntimeError, match=f"^tokenmill.titans_memory_decode: {says}$"):
        tm.titans_memory_decode(**call)


def test_decode_refuses_states_that_share_memory():
    q, shared = Z(2, 1, 2, 3), Z(2, 2, 3, 3)
    options = dict.fromkeys(GATES, Z(2, 1, 2))
    with pytest.raises(RuntimeError, match="start: must not share memory with memory"):
        tm.titans_memory_decode(q, q, q, shared, shared, shared.clone(), i32(0, 0), **options)
