"""block_sparse_attention of packed requests: each has the bits that it has in a call of its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from block_sparse_calls import INF, NAN, drawn, gradients, run
from conftest import assert_same, backends, device_of
from each import each_backend

import tokenmill as tm

on_cpu = pytest.mark.skipif("cpu" not in backends(), reason="of the CPU backend")

# Ends of queries and keys: no queries, no keys, blocks that end early, more queries than keys.
ENDS_Q, ENDS_K = (20, 20, 57, 60, 100), (50, 60, 140, 140, 150)
OPTIONS = {
    "causal": {"causal": True, "num_sink": 3, "num_recent": 6, "lists": 2, "sink": True},
    "each head": {"lists": 4, "softcap": 2.0, "hostile": True, "block_k": 2, "entries": 20},
    "shared": {"lists": 1, "block_q": 4, "block_k": 1, "entries": 30, "causal": True},
    "padded": {
        "lists": 1, "block_k": 64, "entries": 1, "num_recent": 5, "causal": True, "ends_k": (),
        "seqlens_k": torch.tensor([48, 17, 0, 33, 48]).int(), "dv": 24,
    },
}  # fmt: skip
TINY = {
    "h": 2, "hk": 1, "d": 16, "dv": 16, "lists": 2, "block_q": 4, "block_k": 2, "entries": 3,
    "causal": True, "num_sink": 1, "num_recent": 2, "sink": True,
}  # fmt: skip
ON_GPUS = ("cuda", "emulated", "triton")
LATENT = {
    "d": 576, "dv": 512, "h": 3, "hk": 1, "lists": 1, "latent": True, "block_q": 1, "block_k": 2,
    "entries": 5, "causal": True, "num_sink": 1, "sink": True,
}  # fmt: skip
# Each program costs an interpreter milliseconds.
FEW = {"ends_q": (3, 3, 8), "ends_k": (5, 9, 17)}
CASES = {
    "tiny": {**FEW, **TINY},
    "tiny padded": {**FEW, **TINY, "lists": 1, "block_k": 1, "ends_k": (), "sink": False,
                    "seqlens_k": torch.tensor([4, 9, 7]).int()},
}  # fmt: skip


def packed(backend, dtype=torch.float32, ends_q=ENDS_Q, ends_k=ENDS_K, **options):
    batch = len(ends_q)
    sizes = {"b": batch, "sq": -(-ends_q[-1] // batch), "sk": 48}
    if ends_k:
        sizes["sk"] = -(-ends_k[-1] // batch)
    return drawn(backend, dtype, ends_q=ends_q, ends_k=ends_k, **sizes, **options)


def alone(backend, args, kwargs, b):
    """The call of request b, and the slices of its queries, keys and lists."""
    q, k, v, indices, counts = args
    kwargs = dict(kwargs)
    first, end = kwargs.pop("cu_seqlens_q")[b : b + 2].tolist()
    row = first // kwargs["block_q"] + b
    rows = slice(row, row + -(-(end - first) // kwargs["block_q"]))
    keys, at = slice(b, b + 1), slice(b, b + 1)
    if "cu_seqlens_k" in kwargs:
        keys, at = slice(*kwargs.pop("cu_seqlens_k")[b : b + 2].tolist()), None
    for name in ("seqlens_k", "block_table"):
        if name in kwargs:
            kwargs[name] = kwargs[name][b : b + 1]
    if "block_table" in kwargs:
        keys, at = slice(None), slice(None)
    own = (q[None, first:end], *(x[keys][None] if at is None else x[keys] for x in (k, v)),
           indices[None, :, rows], counts[None, :, rows])  # fmt: skip
    return own, kwargs, slice(first, end), keys, rows


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{case}-{backend}")
        for backend in backends("reference")
        for case in (CASES if backend == "triton" else OPTIONS)
    ],
)
def test_a_request_has_the_bits_and_gradients_that_it_has_alone(backend, case):
    args, kwargs = packed(backend, **{**OPTIONS, **CASES}[case])
    leaves = [t.detach().requires_grad_() for t in args[:3]]
    if kwargs.get("sink") is not None:
        leaves.append(kwargs["sink"].requires_grad_())
    args[:3] = leaves[:3]
    out, lse, mass = run(backend, args, kwargs, return_mass=True)
    grads = gradients((out, lse), leaves)
    rows = torch.zeros_like(args[4], dtype=torch.bool)
    for b in range(len(kwargs["cu_seqlens_q"]) - 1):
        own, own_kwargs, queries, keys, lists = alone(backend, args, kwargs, b)
        of_b = run(backend, own, own_kwargs, return_mass=True)
        rows[:, lists] = True
        found = (out[queries], lse[:, queries], mass[:, lists])
        assert_same(found, [x[0] for x in of_b], backend)
        g = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=g).to(t) for t in (out, lse)]
        cotangents = [cotangents[0][None, queries], cotangents[1][None, :, queries]]
        seen = [torch.where(torch.isfinite(r), r, 0.0) for r in of_b[:2]]
        of_b = torch.autograd.grad(seen, leaves[:3], cotangents)
        for got, want, at in zip(grads, of_b, (queries, keys, keys), strict=False):
            assert_same(got[at], want[at], backend)
    assert (mass[~rows] == 0).all()
    if backend != "reference":
        want = run("reference", args, kwargs, return_mass=True)
        want = (*want, *gradients(want[:2], leaves))
        for got, of_reference in zip((out, lse, mass, *grads), want, strict=True):
            torch.testing.assert_close(got, of_reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("backend", "ends"),
    [
        pytest.param(backend, ends, id=f"{ends}-{backend}")
        for backend in backends()
        if backend in ON_GPUS
        for ends in ((3, 9, 20, 33), (9, 4, 30, 0), (-(2**31), 2**31 - 1, 7, 5), (0, 39, 0, 40))
        if backend != "triton" or ends[-1] < 40
    ],
)
def test_every_row_is_written_whatever_the_values(backend, ends):
    """Tokens outside all requests are empty rows."""
    args, kwargs = packed(backend, ends_q=(10, 20, 40), ends_k=(10, 20, 40), **TINY)
    ends = torch.tensor(ends, dtype=torch.int32, device=device_of(backend))
    leaves = args[:3] = [t.requires_grad_() for t in args[:3]]
    out, lse, mass = run(
        backend, args, kwargs, return_mass=True, cu_seqlens_q=ends, cu_seqlens_k=ends
    )
    grads = gradients((out, lse), leaves)
    assert not any(t.isnan().any() for t in (out, lse, mass, *grads))
    if ends.tolist() == [3, 9, 20, 33]:
        for loose in (slice(0, 3), slice(33, 40)):
            assert (out[loose] == 0).all() and (lse[:, loose] == -INF).all()
            assert all((grad[loose] == 0).all() for grad in grads)
        assert (lse[:, 3:33] > -INF).all()


@pytest.mark.parametrize("backend", [b for b in backends() if b in ON_GPUS])
@pytest.mark.parametrize("ends", [(1, 2, 2, 3), (-(2**31), 2**31 - 1, 2, 1)], ids=str)
def test_every_row_of_latent_heads_is_written_whatever_the_values(backend, ends):
    args, kwargs = packed(backend, ends_q=(1, 2, 4), ends_k=(9, 20, 40), **LATENT)
    ends = torch.tensor(ends, dtype=torch.int32, device=device_of(backend))
    results = run(backend, args, kwargs, return_mass=True, cu_seqlens_q=ends, cu_seqlens_k=ends)
    assert not any(t.isnan().any() for t in results)
    if ends.tolist() == [1, 2, 2, 3]:
        out, lse, _ = results
        for loose in (0, 3):
            assert (out[loose] == 0).all() and (lse[:, loose] == -INF).all()
        assert (lse[:, 1:3] > -INF).all()


@each_backend
@pytest.mark.parametrize("page", [0, 8])
def test_packed_queries_of_padded_keys_and_of_pages(backend, page):
    """Lengths are clamped to the existing keys."""
    lengths = torch.tensor([48, 17, 0, 33], dtype=torch.int32)
    ends, sizes = (20, 20, 29, 70), {"causal": True, "num_sink": 2, "num_recent": 5, "block_k": 8}
    if backend == "triton":
        ends, sizes = (2, 2, 5, 8), TINY
    args, kwargs = packed(
        backend, ends_q=ends, ends_k=(), page=page, seqlens_k=lengths, return_mass=True, **sizes
    )
    q, k, v, *lists = args
    if page:
        table = kwargs["block_table"]
        used = torch.zeros(len(k), dtype=torch.bool, device=k.device)
        for b, n in enumerate(lengths.tolist()):
            used[table[b, : -(-n // page)].long()] = True
        k, v = (torch.where(used.view(-1, 1, 1, 1), x, NAN) for x in (k, v))
    else:
        k, v = k.clone(), v.clone()
        for b, n in enumerate(lengths.tolist()):
            k[b, n:] = v[b, n:] = NAN
    results = run(backend, (q, k, v, *lists), kwargs)
    for b in range(4):
        own, own_kwargs, queries, _, rows = alone(backend, (q, k, v, *lists), kwargs, b)
        of_b = run(backend, own, own_kwargs)
        found = results[0][queries], results[1][:, queries], results[2][:, rows]
        assert_same(found, [x[0] for x in of_b], backend)
        assert not any(x.isnan().any() for x in found)


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b != "triton"])
def test_lists_of_hip_block_select_are_those_of_packed_queries(backend):
    g = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 40, 41, 100], dtype=torch.int32).to(device_of(backend))
    q = torch.randn(100, 4, 16, generator=g).to(device_of(backend))
    k, v = (torch.randn(100, 2, 16, generator=g).to(device_of(backend)) for _ in range(2))
    sizes = {"block_q": 16, "block_k": 2, "num_sink": 2, "num_recent": 8, "backend": backend}
    lists = tm.hip_block_select(q, k, budget=16, stride_q=1, cu_seqlens_q=ends, **sizes)
    got = tm.block_sparse_attention(q, k, v, *lists, causal=True, cu_seqlens_q=ends, **sizes)
    for first, end in itertools.pairwise(ends.tolist()):
        own = (t[None, first:end] for t in (q, k, v))
        want = tm.hip_attention(*own, budget=16, stride_q=1, **sizes)
        torch.testing.assert_close(got[first:end], want[0], rtol=2e-5, atol=2e-5)


@on_cpu
@pytest.mark.parametrize("isa", tm.testing.cpu_isas(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(3, 150, 40), (9,) * 24], ids=["shares", "many"])
def test_threads_change_no_bits(lengths, dtype, isa, threads):
    """Requests share tiles of heads and parts of keys among threads, or outnumber the threads."""
    ends = tuple(itertools.accumulate(lengths))
    ends_k = tuple(itertools.accumulate(8 * n for n in lengths))
    args, kwargs = packed(
        "cpu", dtype, ends_q=ends, ends_k=ends_k, h=2, hk=1, d=48, dv=72, lists=2, entries=90,
        block_q=32, block_k=8, causal=True, num_sink=5, num_recent=20, sink=True,
    )  # fmt: skip

    def results():
        leaves = [t.detach().requires_grad_() for t in args[:3]]
        out, lse, mass = run("cpu", (*leaves, *args[3:]), kwargs, return_mass=True)
        return out, lse, mass, *gradients((out, lse), leaves)

    threads(1)
    want = results()
    for n in (2, 8):
        threads(n)
        assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True))


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpu") if b in backends("reference")])
def test_values_of_cu_seqlens_are_checked_on_the_host(backend):
    args, kwargs = packed(backend, **OPTIONS["causal"])
    ends = kwargs["cu_seqlens_q"]
    for name, bad, rule in (
        ("cu_seqlens_q", ends + 1, "must start at 0; got 1"),
        ("cu_seqlens_q", ends.clamp(max=99), "must end at the number of tokens, 100; got 99"),
        ("cu_seqlens_k", -ends, "must not decrease; got"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: {rule}"):
            run(backend, args, kwargs, **{name: bad})


@each_backend
@pytest.mark.parametrize("keys", ["packed", "padded", "pages"])
def test_latent_heads_of_a_request_are_those_that_it_has_alone(backend, keys):
    """On the CPU the bits are equal; a GPU splits rows of keys to fill more CTAs."""
    lengths = torch.tensor([48, 17, 0, 33], dtype=torch.int32)
    options = {"ends_q": (2, 2, 5, 8), "ends_k": (), "seqlens_k": lengths}
    if keys == "packed":
        options = {"ends_q": (1, 1, 3, 4), "ends_k": (5, 20, 30, 34), "lists": 3, "hostile": True}
    if keys == "pages":
        options["page"] = 8
    args, kwargs = packed(backend, return_mass=True, **{**LATENT, **options})
    results = run(backend, args, kwargs)
    for b in range(4):
        own, own_kwargs, queries, _, rows = alone(backend, args, kwargs, b)
        found = results[0][queries], results[1][:, queries], results[2][:, rows]
        for got, want in zip(found, run(backend, own, own_kwargs), strict=True):
            if backend in ON_GPUS:
                torch.testing.assert_close(got, want[0], rtol=2e-5, atol=2e-5)
            else:
                assert_same(got, want[0], backend)
