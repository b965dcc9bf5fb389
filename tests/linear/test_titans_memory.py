"""Properties of titans_memory and titans_memory_decode."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import backends, device_of
from each import each_kernel, ints
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

GATES = ("alpha", "eta", "theta")


def recurrence(q, k, v, alpha, eta, theta, memory=None, momentum=None, *, chunk):
    """The recurrence token by token: out, memory and momentum."""
    if memory is None:
        memory = momentum = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outs = [v[:, :0]]
    for t in range(q.shape[1]):
        if t % chunk == 0:
            start = memory
        error = torch.einsum("bhd,bhde->bhe", k[:, t], start) - v[:, t]
        gradient = torch.einsum("bhd,bhe->bhde", k[:, t], error)
        forget, keep, step = (gate[:, t, :, None, None] for gate in (alpha, eta, theta))
        momentum = keep * momentum - step * gradient
        memory = (1 - forget) * memory + momentum
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, t], memory)[:, None])
    return torch.cat(outs, 1), memory, momentum


def draw(*lead, heads=2, d=3, dv=4, states=2, dtype=torch.float64, seed=0):
    """q, k, v, alpha, eta, theta, memory, momentum, each requiring a gradient."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*lead, heads, n, generator=g) / n**0.5 for n in (d, d, dv)]
    tensors += [torch.rand(*lead, heads, generator=g) for _ in GATES]
    tensors += [torch.randn(states, heads, d, dv, generator=g) for _ in range(2)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def run(q, k, v, alpha, eta, theta, *state, **options):
    """Returns out, memory and momentum."""
    out, final = tm.titans_memory(
        q, k, v, alpha=alpha, eta=eta, theta=theta, initial_state=state or None,
        return_final_state=True, **options,
    )  # fmt: skip
    return out, *final


def with_gradients(results, leaves):
    """The results, and the gradients of one combination of them."""
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in results]
    weights = [w.to(t.dtype) for w, t in zip(weights, results, strict=True)]
    return *results, *torch.autograd.grad(results, leaves, weights)


def is_the_recurrence(length, chunk, *, batch=1, heads=1, d=3, dv=4, begun=True):
    given = draw(batch, length, heads=heads, d=d, dv=dv, states=batch)
    with torch.no_grad():
        given[5].mul_(2 / min(length, chunk))  # larger steps would diverge within a chunk
    given = given if begun else given[:6]
    wanted = with_gradients(recurrence(*given, chunk=chunk), given)
    found = with_gradients(run(*given, chunk_size=chunk), given)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    narrow = [t.detach().float().requires_grad_() for t in given]
    found = with_gradients(run(*narrow, chunk_size=chunk, backend="cpu"), narrow)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max().clamp(min=1e-2)


@examples(20)
@given(
    length=st.integers(1, 40), chunk=st.integers(1, 50), batch=st.integers(1, 2),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)), begun=st.booleans(),
)  # fmt: skip
def test_is_the_recurrence_at_any_length_and_chunk_size(length, chunk, batch, sizes, begun):
    heads, d, dv = sizes
    is_the_recurrence(length, chunk, batch=batch, heads=heads, d=d, dv=dv, begun=begun)


@pytest.mark.parametrize(("length", "chunk"), [(65, 64), (150, 130)])
def test_is_the_recurrence_where_chunks_are_longer_than_blocks(length, chunk):
    is_the_recurrence(length, chunk)


@pytest.mark.parametrize("gates", [(1, 1, 1), (0, 0, 0), (1, 0, 1), (0, 1, 0), (0, 0, 0.5)])
def test_gates_at_their_ends_are_exact(gates):
    given = draw(2, 11)
    with torch.no_grad():
        for gate, value in zip(given[3:6], gates, strict=True):
            gate.fill_(value)
    wanted = with_gradients(recurrence(*given, chunk=4), given)
    found = with_gradients(run(*given, chunk_size=4), given)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


PACKED = (0, 4, 4, 11, 12)


def test_packed_sequences_are_apart():
    *tensors, memory, momentum = given = draw(12, states=4)
    wanted = [
        recurrence(
            *(t[None, begin:end] for t in tensors), memory[i, None], momentum[i, None], chunk=3
        )
        for i, (begin, end) in enumerate(pairwise(PACKED))
    ]
    out, *states = zip(*wanted, strict=True)
    wanted = torch.cat(out, 1)[0], *(torch.cat(s) for s in states)
    found = with_gradients(run(*given, chunk_size=3, cu_seqlens=ints(*PACKED)), given)
    wanted = with_gradients(wanted, given)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", backends("reference"))
def test_what_is_not_finite_stays_in_its_sequence(backend):
    device = device_of(backend)
    given = [t.detach().float().to(device).requires_grad_() for t in draw(12, states=4)]
    options = {"chunk_size": 3, "cu_seqlens": ints(*PACKED).to(device), "backend": backend}
    wanted = [t.detach() for t in run(*given, **options)]
    with torch.no_grad():
        for t in given:
            (t[4:11] if t.shape[0] == 12 else t[2]).fill_(torch.nan)
    found = run(*given, **options)
    for a, b in zip(found, wanted, strict=True):
        rows = [i for i in range(len(a)) if not (4 <= i < 11 if len(a) == 12 else i == 2)]
        torch.testing.assert_close(a[rows], b[rows])
    for t, grad in zip(given, torch.autograd.grad([f.sum() for f in found], given), strict=True):
        rows = [i for i in range(len(t)) if not (4 <= i < 11 if len(t) == 12 else i == 2)]
        assert grad[rows].isfinite().all()


@pytest.mark.parametrize("backend", [b for b in backends() if b != "cpu"])
def test_tokens_of_no_sequence_have_results_and_gradients_0(backend):
    """The values of cu_seqlens are arbitrary and not checked here."""
    device = device_of(backend)
    given = [t.detach().float().to(device).requires_grad_() for t in draw(12, states=2)]
    with torch.no_grad():
        given[2][:2] = torch.nan
    inputs = given[:6]
    options = {"chunk_size": 3, "backend": backend}
    out, *_ = run(*given, cu_seqlens=ints(2, 5, 9).to(device), **options)
    inside = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.arange(2, 9), True)
    assert not out[~inside].any() and (out[inside] != 0).all()
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert not grad[~inside].any() and grad[inside].isfinite().all()
    out, *_ = run(*inputs, cu_seqlens=ints(2, 90, -4).to(device), **options)
    torch.autograd.grad(out.sum(), inputs)
    assert torch.isfinite(out).all()
    assert not run(*inputs, cu_seqlens=ints(7).to(device), **options)[0].any()


@each_kernel
def test_later_tokens_are_hidden(backend):
    device = device_of(backend)
    inputs = [t.detach().float().to(device) for t in draw(1, 12)[:6]]
    wanted = run(*inputs, chunk_size=8, backend=backend)[0]
    for t in inputs[:3]:
        t[:, 6:] = torch.nan
    found = run(*inputs, chunk_size=8, backend=backend)[0]
    torch.testing.assert_close(found[:, :6], wanted[:, :6])


def test_batches_are_apart():
    given = draw(3, 11, states=3)
    wanted = run(*given, chunk_size=4)
    with torch.no_grad():
        given[1][1, 5] = torch.nan
    for a, b in zip(run(*given, chunk_size=4), wanted, strict=True):
        assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
def test_derivatives_of_both_orders(packed):
    lead, options = ((5,), {"cu_seqlens": ints(0, 3, 5)}) if packed else ((2, 3), {})
    given = draw(*lead, heads=1, d=2, dv=2)

    def function(*tensors):
        return run(*tensors, chunk_size=2, **options)

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transforms(dtype):
    q, k, v, alpha, eta, theta = (t.detach() for t in draw(2, 9, dtype=dtype)[:6])

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
    for i, t in enumerate(inputs := (q, k, v, alpha, eta, theta)):  # each input batched separately

        def loss_of(x, i=i):
            return sum(r.square().sum() for r in run(*inputs[:i], x, *inputs[i + 1 :]))

        found = torch.func.vmap(torch.func.grad(loss_of))(torch.stack([2 * t, t]))[1]
        torch.testing.assert_close(found, torch.func.grad(loss_of)(t))


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
    out, *state = run(*given, cu_seqlens=ints(0, 0, 0))
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
    for t in table[:3]:  # not read for unfilled slots
        t[3] = torch.nan if order is None else t[3]
    table[0].fill_(torch.nan)
    slots = None if order is None else ints(*order[:3])
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
            state_indices=ints(-1, 1),
        )  # fmt: skip
        assert not out[0].any()
        torch.testing.assert_close(out[1:], wanted[1:, t : t + 1])
    torch.testing.assert_close((table[1][1], table[2][1]), (memory[1], momentum[1]))
    for now, before in zip(table, kept, strict=True):
        assert torch.equal(now[::2], before[::2])
    kept = [t.clone() for t in table]
    options = dict(zip(GATES, gates, strict=True))
    out = tm.titans_memory_decode(
        q, k, v, *table, **options, chunk_size=4, state_indices=ints(-1, -1)
    )
    assert not out.any() and all(torch.equal(a, b) for a, b in zip(table, kept, strict=True))


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, b) for b in backends("reference")] + [(torch.bfloat16, "cpu")],
)
@torch.no_grad()
def test_decode_goes_on_from_the_prompt_of_each_backend(dtype, backend):
    """The prompt has whole chunks; an odd number of tokens follows."""
    given = [t.detach().float().to(device_of(backend)) for t in draw(2, 13)[:6]]
    given[:3] = [t.to(dtype) for t in given[:3]]
    wanted = run(*given, chunk_size=4, backend=backend)
    begun = run(*(t[:, :8] for t in given), chunk_size=4, backend=backend)
    state = [torch.full_like(begun[1], torch.nan), *(t.clone() for t in begun[1:])]
    filled = ints(0, 0).to(given[0].device)
    q, k, v, *gates = (t[:, 8:] for t in given)
    out = tm.titans_memory_decode(
        q, k, v, *state, filled, **dict(zip(GATES, gates, strict=True)), chunk_size=4
    )
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(out, wanted[0][:, 8:], **tolerance)
    torch.testing.assert_close(state[1:], [*wanted[1:]], rtol=2e-5, atol=2e-5)
    assert out.dtype == dtype and filled.tolist() == [1, 1]


@torch.no_grad()
def test_decode_compiles():
    q, k, v, *gates = (t.detach() for t in draw(2, 3)[:6])
    torch._dynamo.reset()
    tables = states(3), states(3)
    compiled = torch.compile(tm.titans_memory_decode, fullgraph=True, backend="aot_eager")
    for function, table in zip((compiled, tm.titans_memory_decode), tables, strict=True):
        out = function(
            q, k, v, *table, **dict(zip(GATES, gates, strict=True)), chunk_size=2,
            state_indices=ints(2, -1),
        )  # fmt: skip
        assert out[0].any()
    for a, b in zip(*tables, strict=True):
        torch.testing.assert_close(a, b)


Z = torch.zeros


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"memory": Z(4, 2, 3, 5)}, r"memory: must have shape \[slots, 2, 3, 4\]; got .*"),
        ({"memory": Z(3, 2, 3, 4)}, "memory: must have the slots of start, 4; got 3"),
        ({"momentum": Z(4, 2, 3, 4).half()}, "momentum: must be float32; got float16"),
        ({"filled": Z(4)}, "filled: must be int32; got float32"),
        ({"filled": ints(0, 1, 0)}, r"filled: must have shape \[4\]; got \[3\]"),
        ({"filled": ints(0, 64, 0, 0)}, "filled: must be 0 to 63; got 64"),
        ({"start": Z(1, 2, 3, 4), "memory": Z(1, 2, 3, 4), "momentum": Z(1, 2, 3, 4),
          "filled": ints(0)}, "start: must have a slot for each sequence, 2, without .*; got 1"),
        ({"state_indices": ints(1, 1)}, r"state_indices: must not repeat a slot; got \[1, 1\]"),
        ({"state_indices": ints(1, 4)}, r"state_indices: must be -1 .* below 4; got 4"),
        ({"v": Z(2, 1, 2, 4).requires_grad_()}, "v: must not require a gradient.*; got True"),
        ({"memory": Z(1, 2, 3, 4).expand(4, -1, -1, -1)}, "memory: must have each element at .*"),
        ({"state_indices": ints(1, -2)}, r"state_indices: must be -1 .* below 4; got -2"),
        ({"state_indices": ints(1)}, r"state_indices: must have shape \[2\]; got \[1\]"),
        ({"q": Z(2, 1, 3)}, r"q: must have 4 dimensions \[B, S, H, D\]; got 3"),
        ({"v": Z(2, 1, 3, 4)}, "v: must have the shape of q up to the head dimension, .*"),
        ({"theta": Z(2, 2)}, r"theta: must have shape \[2, 1, 2\]; got \[2, 2\]"),
        ({"eta": Z(2, 1, 2).int()}, "eta: must be a floating-point tensor; got int32"),
        ({"chunk_size": 0}, "chunk_size: must be at least 1; got 0"),
        ({"filled": None}, "filled: must be a tensor; got None"),
    ],
)  # fmt: skip
def test_bad_decode(edits, says):
    with pytest.raises(RuntimeError, match=f"^tokenmill.titans_memory_decode: {says}$"):
        decode_of_zeros(**edits)


def decode_of_zeros(**edits):
    """Two requests and four slots."""
    table = dict(zip(("start", "memory", "momentum", "filled"), states(4), strict=True))
    table = {n: t.float() if t.dim() > 1 else t for n, t in table.items()}
    q, v = Z(2, 1, 2, 3), Z(2, 1, 2, 4)
    call = {"q": q, "k": q, "v": v, **table, **dict.fromkeys(GATES, Z(2, 1, 2)), **edits}
    return tm.titans_memory_decode(**call)


ROOM = Z(2, 4, 2, 3, 8)  # room for states [4, 2, 3, 4] at any offset


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"start": ROOM[0, ..., :4], "memory": ROOM[0, ..., 2:6]}, "start: .* with memory"),
        ({"memory": ROOM[0, ..., :4], "momentum": ROOM[0, ..., :4]}, "memory: .* with momentum"),
        ({"start": ROOM.view(-1)[:96].view(4, 2, 3, 4),
          "momentum": ROOM.view(-1)[95:191].view(4, 2, 3, 4)}, "start: .* with momentum"),
        ({"momentum": ROOM[0, ..., :4], "q": ROOM[0, :2, None, :, 0, :3]}, "momentum: .* with q"),
        ({"memory": ROOM[0, ..., :4], "eta": ROOM[0, :2, None, :, 1, 1]}, "memory: .* with eta"),
    ],
)  # fmt: skip
def test_decode_refuses_states_that_share_memory(edits, says):
    before = ROOM.clone()
    with pytest.raises(RuntimeError, match=says.replace(".*", "must not share memory")):
        decode_of_zeros(**edits)
    assert torch.equal(ROOM, before)


def test_decode_refuses_counts_that_are_its_slots():
    numbers = ints(0, 1, 2, 3, 0)
    with pytest.raises(RuntimeError, match="filled: must not share memory with state_indices"):
        decode_of_zeros(filled=numbers[:4], state_indices=numbers[3:])


def test_decode_takes_states_that_lie_between_each_other():
    decode_of_zeros(memory=ROOM[0, ..., :4], momentum=ROOM[0, ..., 4:], start=ROOM[1, ..., :4])
