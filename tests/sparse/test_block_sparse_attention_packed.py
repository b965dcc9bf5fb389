"""block_sparse_attention of packed requests: each has the bits that it has alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from block_sparse_calls import INF, NAN, drawn, gradients, run
from conftest import backends, device_of

import tokenmill as tm

each_backend = pytest.mark.parametrize("backend", backends("reference"))
on_cpu = pytest.mark.skipif("cpu" not in backends(), reason="of the CPU backend")

# Of queries and of keys: no queries, no keys, blocks that end early, more queries than keys.
ENDS_Q, ENDS_K = (20, 20, 57, 60, 100), (50, 60, 140, 140, 150)
OPTIONS = {
    "causal": {"causal": True, "num_sink": 3, "num_recent": 6, "lists": 2, "sink": True},
    "each head": {"lists": 4, "softcap": 2.0, "hostile": True, "block_k": 2, "entries": 20},
    "shared": {"lists": 1, "block_q": 4, "block_k": 1, "entries": 30, "causal": True},
}
TINY = {
    "h": 2, "hk": 1, "d": 16, "dv": 16, "lists": 2, "block_q": 4, "block_k": 2, "entries": 3,
    "causal": True, "num_sink": 1, "num_recent": 2, "sink": True,
}  # fmt: skip
ON_GPUS = ("cuda", "emulated", "triton")
each_call = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def packed(backend, dtype=torch.float32, ends_q=ENDS_Q, ends_k=ENDS_K, **options):
    batch = len(ends_q)
    sizes = {"b": batch, "sq": -(-ends_q[-1] // batch), "sk": 48}
    if ends_k:
        sizes["sk"] = -(-ends_k[-1] // batch)
    return drawn(backend, dtype, ends_q=ends_q, ends_k=ends_k, **sizes, **options)


def alone(backend, args, kwargs, b):
    """The call of request b, and where its queries, keys and lists are."""
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


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b not in ON_GPUS])
@each_call
def test_a_request_has_the_bits_and_gradients_that_it_has_alone(backend, options):
    args, kwargs = packed(backend, **options)
    leaves = [t.detach().requires_grad_() for t in args[:3]]
    out, lse, mass = run(backend, (*leaves, *args[3:]), kwargs, return_mass=True)
    grads = gradients((out, lse), leaves)
    rows = torch.zeros_like(args[4], dtype=torch.bool)
    for b in range(len(ENDS_Q)):
        own, own_kwargs, queries, keys, lists = alone(backend, (*leaves, *args[3:]), kwargs, b)
        of_b = run(backend, own, own_kwargs, return_mass=True)
        rows[:, lists] = True
        for got, want in zip((out[queries], lse[:, queries], mass[:, lists]), of_b, strict=True):
            assert torch.equal(got, want[0])
        g = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=g) for t in (out, lse)]
        cotangents = [cotangents[0][None, queries], cotangents[1][None, :, queries]]
        seen = [torch.where(torch.isfinite(r), r, 0.0) for r in of_b[:2]]
        of_b = torch.autograd.grad(seen, leaves, cotangents)
        for got, want, at in zip(grads, of_b, (queries, keys, keys), strict=True):
            if backend == "reference":
                torch.testing.assert_close(got[at], want[at])
            else:
                assert torch.equal(got[at], want[at])
    assert (mass[~rows] == 0).all()


CASES = [
    (backend, options)
    for backend in backends()
    for options in (OPTIONS if backend in ("cuda", "emulated") else ["tiny"])
    if backend in ON_GPUS
]


@pytest.mark.parametrize("backend, options", CASES)
def test_a_request_has_the_bits_that_it_has_alone(backend, options):
    ends = {}
    if options == "tiny":  # each program costs an interpreter milliseconds
        ends = {"ends_q": (3, 3, 8), "ends_k": (5, 9, 17)}
    options = {**OPTIONS, "tiny": TINY}[options]
    args, kwargs = packed(backend, **ends, **options)
    results = run(backend, args, kwargs, return_mass=True)
    for b in range(len(kwargs["cu_seqlens_q"]) - 1):
        own, own_kwargs, queries, _, lists = alone(backend, args, kwargs, b)
        of_b = run(backend, own, own_kwargs, return_mass=True)
        found = results[0][queries], results[1][:, queries], results[2][:, lists]
        for got, want in zip(found, of_b, strict=True):
            assert torch.equal(got, want[0])
    want = run("reference", args, kwargs, return_mass=True)
    for got, of_reference in zip(results, want, strict=True):
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
    """And tokens without a request are empty rows."""
    args, kwargs = packed(backend, ends_q=(10, 20, 40), ends_k=(10, 20, 40), **TINY)
    ends = torch.tensor(ends, dtype=torch.int32, device=device_of(backend))
    out, lse, mass = run(
        backend, args, kwargs, return_mass=True, cu_seqlens_q=ends, cu_seqlens_k=ends
    )
    assert not any(t.isnan().any() for t in (out, lse, mass))
    if ends.tolist() == [3, 9, 20, 33]:
        for loose in (slice(0, 3), slice(33, 40)):
            assert (out[loose] == 0).all() and (lse[:, loose] == -INF).all()
        assert (lse[:, 3:33] > -INF).all()


@each_backend
@pytest.mark.parametrize("page", [0, 8])
def test_packed_queries_of_padded_keys_and_of_pages(backend, page):
    """Lengths cut what is there, whatever it is."""
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
        for got, want in zip(found, of_b, strict=True):
            assert torch.equal(got, want[0])
            assert not got.isnan().any()


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
    """Requests that share tiles of heads and parts of keys among threads, and more than threads."""
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


@pytest.mark.parametrize("backend", [b for b in backends() if b in ON_GPUS])
def test_gradients_of_packed_requests_are_refused_on_gpus(backend):
    args, kwargs = packed(backend, **TINY, ends_q=(1, 2), ends_k=(1, 2))
    with pytest.raises(RuntimeError, match="packed requests have gradients on the CPU alone"):
        run(backend, (args[0].requires_grad_(), *args[1:]), kwargs)


LATENT = {
    "d": 576, "dv": 512, "h": 3, "hk": 1, "lists": 1, "latent": True, "block_q": 1, "block_k": 2,
    "entries": 5, "causal": True, "num_sink": 1, "sink": True,
}  # fmt: skip


@pytest.mark.parametrize("backend", [b for b in backends("reference") if b not in ON_GPUS])
@pytest.mark.parametrize("page", [0, 8])
def test_latent_heads_of_a_request_have_the_bits_that_they_have_alone(backend, page):
    lengths = torch.tensor([48, 17, 0, 33], dtype=torch.int32)
    args, kwargs = packed(
        backend, ends_q=(2, 2, 5, 8), ends_k=(), page=page, seqlens_k=lengths, return_mass=True,
        **LATENT,
    )  # fmt: skip
    results = run(backend, args, kwargs)
    for b in range(4):
        own, own_kwargs, queries, _, rows = alone(backend, args, kwargs, b)
        found = results[0][queries], results[1][:, queries], results[2][:, rows]
        for got, want in zip(found, run(backend, own, own_kwargs), strict=True):
            assert torch.equal(got, want[0])


@pytest.mark.parametrize("backend", [b for b in backends() if b in ON_GPUS])
def test_kernels_refuse_what_they_cannot_do_with_packed_requests(backend):
    kernels = getattr(torch.ops, tm._dispatch.namespace(backend))
    sizes = {"ends_q": (1, 2), "ends_k": (1, 2)}
    args, kwargs = packed(backend, **LATENT, **sizes)
    with pytest.raises(RuntimeError, match="latent heads of packed requests have kernels on the"):
        run(backend, args, kwargs)
    del kwargs["return_lse"]
    with pytest.raises(RuntimeError, match="cu_seqlens_q: must be None for latent heads on CUDA"):
        kernels.block_sparse_attention(*args, **kwargs)
    args, kwargs = packed(backend, **TINY, **sizes)
    out, lse = run(backend, args, kwargs)
    del kwargs["return_lse"]
    with pytest.raises(RuntimeError, match="cu_seqlens_q: must be None for gradients on CUDA"):
        kernels.block_sparse_attention_backward(out, None, out, lse, False, *args, **kwargs)
