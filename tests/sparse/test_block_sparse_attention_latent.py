"""block_sparse_attention with a list per query and the head shapes of latent caches."""

from __future__ import annotations

import pytest
import torch
from block_sparse_calls import INF, NAN, drawn, full_lists, inside, run
from conftest import assert_same, backends, cpu_variants, device_of
from each import each_backend

import tokenmill as tm
from tokenmill import registry
from tokenmill.testing import assert_accurate

SPEC = registry.get("block_sparse_attention")
SERIAL = ("triton", "emulated")  # an interpreter runs the same programs in any dtype


LATENT = {"hk": 1, "d": 576, "dv": 512, "latent": True, "block_q": 1}
CASES = {
    "one list of all heads": {
        **LATENT, "b": 2, "sq": 3, "sk": 20, "h": 3, "lists": 1, "block_k": 1, "entries": 9,
        "causal": True,
    },
    "more heads than a tile": {
        **LATENT, "b": 1, "sq": 3, "sk": 40, "h": 20, "lists": 1, "block_k": 4, "entries": 6,
        "causal": True, "num_sink": 3, "num_recent": 5, "sink": True, "softcap": 2.0, "scale": 0.1,
    },
    "groups of heads": {
        "b": 2, "sq": 3, "sk": 20, "h": 6, "hk": 2, "d": 264, "dv": 40, "lists": 2, "block_q": 1,
        "block_k": 2, "entries": 5, "seqlens_k": torch.tensor([17, 0]).int(),
    },
    "one list of several groups": {
        "b": 1, "sq": 2, "sk": 20, "h": 4, "hk": 2, "d": 40, "dv": 264, "lists": 1, "block_q": 1,
        "block_k": 1, "entries": 5,
    },
    "a list of each head, not to be trusted": {
        **LATENT, "b": 2, "sq": 2, "sk": 24, "h": 3, "lists": 3, "block_k": 2, "entries": 14,
        "hostile": True, "causal": True, "num_recent": 2, "seqlens_k": torch.tensor([24, 9]).int(),
    },
    "pages": {
        **LATENT, "b": 2, "sq": 3, "sk": 32, "h": 2, "lists": 1, "block_k": 1, "entries": 9,
        "page": 8, "causal": True, "num_sink": 1, "seqlens_k": torch.tensor([30, 11]).int(),
    },
    "ranges of a long list": {
        **LATENT, "b": 1, "sq": 1, "sk": 700, "h": 2, "lists": 1, "block_k": 128, "entries": 5,
    },
    "more queries than keys": {
        **LATENT, "b": 1, "sq": 5, "sk": 2, "h": 1, "lists": 1, "block_k": 1, "entries": 2,
        "causal": True, "sink": True,
    },
}  # fmt: skip


def moved(results):
    return [r.cpu() for r in results]


@pytest.mark.parametrize(
    ("case", "dtype", "backend", "isa"),
    [
        pytest.param(case, dtype, backend, isa, id=f"{case}-{dtype}-{backend}-{isa}")
        for n, case in enumerate(CASES)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for backend, isa in cpu_variants()
        if backend not in SERIAL or dtype == torch.float32 or n == 1
    ],
    indirect=["isa"],
)
def test_results_keep_the_error_budget(case, dtype, backend, isa):
    args, kwargs = drawn("cpu", dtype, **CASES[case])
    wide_args, wide_kwargs = tm.testing.convert((args, kwargs), torch.float64)
    wide = run("reference", wide_args, wide_kwargs)
    plain = SPEC.plain(SPEC.record(*args, **kwargs))
    device = device_of(backend)
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    found = run(backend, [t.to(device) for t in args], there)
    for name, *three in zip(("out", "lse"), moved(found), wide, plain, strict=False):
        finite = torch.isfinite(three[1])
        assert torch.equal(torch.isfinite(three[0]), finite)
        assert_accurate(*(torch.where(finite, t, 0.0) for t in three), name=name)


@each_backend
def test_any_layout_of_queries_lists_and_results(backend):
    args, kwargs = drawn(backend, **CASES["a list of each head, not to be trusted"])
    q, k, v, indices, counts = args
    want = run(backend, args, kwargs)
    q = torch.stack([q, q + 1], 3)[..., 0, :]
    k = torch.cat([k, k + 1], 2)[:, :, :1]
    indices = inside(indices.transpose(1, 2).contiguous().transpose(1, 2))
    counts = counts.transpose(0, 1).contiguous().transpose(0, 1)
    lists = indices, inside(counts)
    to = torch.full((*q.shape[:2], 2 * q.shape[2], v.shape[3]), NAN, device=q.device)[:, :, ::2]
    given, lse = run(backend, (q, k, k[..., :512], *lists), kwargs, out=to)
    assert given is to
    assert_same((to, lse), want, backend)


@each_backend
def test_mass_of_listed_keys_is_their_weight(backend):
    args, kwargs = drawn(backend, **{**LATENT, "b": 2, "sq": 3, "sk": 5, "h": 4, "lists": 1,
                                     "block_k": 1, "causal": True})  # fmt: skip
    q, k, v = args[:3]
    z = torch.einsum("bihd,bjd->bhij", q, k[:, :, 0]) * 576**-0.5
    later = torch.ones(z.shape[2:], dtype=torch.bool, device=z.device).triu(3)
    weights = z.masked_fill(later, -INF).softmax(-1)
    indices, counts = full_lists(q, k, 1, 1)
    for lists in (1, 4):
        own = indices.expand(-1, lists, -1, -1), counts.expand(-1, lists, -1)
        mass = run(backend, (q, k, v, *own), kwargs, return_mass=True)[-1]
        want = weights.unflatten(1, (lists, -1)).sum(2)
        torch.testing.assert_close(mass, want, rtol=2e-5, atol=2e-5)


@each_backend
def test_mass_of_keys_in_pages_is_that_of_dense_ones(backend):
    sizes = {"b": 2, "sq": 2, "sk": 16, "h": 2, "lists": 1, "block_k": 2, "entries": 5, "page": 8}
    args, kwargs = drawn(backend, **LATENT, **sizes, causal=True)
    q, k, v, *lists = args
    kwargs["seqlens_k"] = torch.tensor([16, 11], dtype=torch.int32, device=q.device)
    found = run(backend, args, kwargs, return_mass=True)
    k, v = (x[kwargs["block_table"].long()].flatten(1, 2) for x in (k, v))
    wanted = run(backend, (q, k, v, *lists), kwargs, block_table=None, return_mass=True)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", [b for b in backends() if b not in ("cpu", "reference")])
def test_keys_on_a_page_that_is_not_there_have_no_mass(backend):
    """They add nothing to lse either. On a CPU such a page is an error."""
    sizes = {"b": 1, "sq": 1, "sk": 16, "h": 2, "lists": 1, "block_k": 1, "page": 8}
    args, kwargs = drawn(backend, **LATENT, **sizes)
    q, k, v = args[:3]
    kwargs["seqlens_k"] = torch.tensor([16], dtype=torch.int32, device=q.device)
    kwargs["block_table"][0, 0] = -1
    lists = full_lists(q, k.flatten(0, 1)[None], 1, 1)
    mass = run(backend, (q, k, v, *lists), kwargs, return_mass=True)[-1][0, 0, 0]
    assert (mass[:8] == 0).all()
    torch.testing.assert_close(mass.sum(), torch.tensor(2.0, device=q.device))


@each_backend
def test_what_nobody_sees_is_not_read(backend):
    args, kwargs = drawn(backend, **CASES["pages"])
    want = run(backend, args, kwargs)
    q, k, _, indices, counts = args
    listed = torch.zeros(2, 32, dtype=torch.bool, device=q.device)
    for b, (ids, count) in enumerate(zip(indices[:, 0], counts[:, 0], strict=True)):
        for row, n in zip(ids, count, strict=True):
            listed[b, row[:n].long()] = True
    listed[:, :1] = True  # num_sink
    listed &= torch.arange(32, device=q.device) < kwargs["seqlens_k"][:, None]
    seen = torch.zeros(k.shape[:2], dtype=torch.bool, device=q.device)
    seen[kwargs["block_table"].long()] = listed.view(2, 4, 8)
    assert not seen.all()
    k = torch.where(seen[..., None, None], k, NAN)
    got = run(backend, (q, k, k[..., :512], *args[3:]), kwargs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@each_backend
def test_lists_of_an_indexer_over_latent_keys_are_attention_with_a_mask(backend):
    """Sparse prefill as in DeepSeek-V3.2-Exp (2025), 2.1: the heads of a query attend to the topk
    latent keys that its indexer scores highest."""
    g = torch.Generator().manual_seed(5)
    tokens, heads, topk = 12, 3, 4
    latent = torch.randn(1, tokens, 1, 576, generator=g)
    q = torch.randn(1, tokens, heads, 576, generator=g)
    q_index, weights = (torch.randint(-3, 4, s, generator=g).float()
                        for s in ((1, tokens, 2, 8), (1, tokens, 2)))  # fmt: skip
    k_index = torch.randint(-3, 4, (1, tokens, 8), generator=g).float()
    device = device_of(backend)
    q, latent, q_index, k_index, weights = (
        t.to(device) for t in (q, latent, q_index, k_index, weights)
    )
    indices, counts = tm.indexer_topk_select(q_index, k_index, weights, topk, backend=backend)
    out, lse = tm.block_sparse_attention(
        q, latent, latent[..., :512], indices[:, None], counts[:, None], block_q=1, block_k=1,
        causal=True, scale=192**-0.5, return_lse=True, backend=backend,
    )  # fmt: skip
    for i in range(tokens):
        scores = (weights[0, i, :, None] * (q_index[0, i] @ k_index[0, : i + 1].T).relu()).sum(0)
        chosen = sorted(range(i + 1), key=lambda j: (-float(scores[j]), j))[:topk]
        keys = latent[0, sorted(chosen), 0]
        z = q[0, i] @ keys.T * 192**-0.5
        torch.testing.assert_close(out[0, i], z.softmax(-1) @ keys[:, :512], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[0, :, i], z.logsumexp(-1), rtol=1e-4, atol=1e-5)


@each_backend
def test_wide_heads_go_with_single_queries_and_have_no_gradient(backend):
    args, kwargs = drawn(backend, **CASES["one list of all heads"])
    for i, name in enumerate("qkv"):
        changed = [t.detach().requires_grad_(n == i) for n, t in enumerate(args[:3])]
        rule = f"{name}: must not require a gradient, there is none with latent heads; got True"
        with pytest.raises(RuntimeError, match=rule):
            run(backend, (*changed, *args[3:]), kwargs)
    with pytest.raises(RuntimeError, match="q: must have a head dimension of 1 to 256; got 576"):
        run(backend, args, kwargs, block_q=2)
    q, k, _, *lists = args
    with pytest.raises(RuntimeError, match="v: must have a head dimension of 1 to 512; got 576"):
        run(backend, (q, k, k, *lists), kwargs)
    if backend == "reference":
        return
    out, lse = run(backend, args, kwargs)
    backward = getattr(
        torch.ops, tm._call.choose.namespace(backend)
    ).block_sparse_attention_backward
    with pytest.raises(RuntimeError, match="q: must have a head dimension of 1 to 256 for a gradi"):
        backward(out, None, out, lse, False, *args, block_q=1, block_k=1)


@pytest.mark.skipif("cpu" not in backends(), reason="the CPU backend is not selected")
def test_no_number_of_threads_changes_a_bit():
    args, kwargs = drawn("cpu", **{**CASES["more heads than a tile"], "sq": 40, "sk": 300})
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run("cpu", args, kwargs))
    torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
