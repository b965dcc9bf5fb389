"""hip_attention: the search and the attention together, in prefill and in decoding."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import assert_same, backends, device_of
from each import each_backend, ints
from hip_requests import Requests, forms

import tokenmill as tm
from tokenmill.sparse import HipLists, hip_attention

SIZES = {"budget": 16, "block_q": 16, "block_k": 2, "num_sink": 4, "num_recent": 8}


def draw(backend, sq, sk, h=4, hk=2, d=32, dv=24):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=g).to(device_of(backend))
        for shape in ((2, sq, h, d), (2, sk, hk, d), (2, sk, hk, dv))
    ]


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@each_backend
def test_short_sequences_get_exact_attention(backend):
    q, k, v = (t.requires_grad_() for t in draw(backend, 28, 28))
    ours = hip_attention(q, k, v, **SIZES, return_lse=True, backend=backend)
    dense = tm.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    close(ours, dense)
    cotangent = torch.randn_like(ours[0])
    grads = [torch.autograd.grad(out, (q, k, v), cotangent) for out, _ in (ours, dense)]
    close(*grads)


@each_backend
@pytest.mark.parametrize("tokens", [1, None])
@pytest.mark.parametrize(
    ("num_sink", "budget", "num_recent", "block_k"),
    [(4, 32, 28, 4), (4, 32, 30, 8), (15, 16, 9, 2), (1, 16, 0, 16), (0, 8, 3, 8)],
)
def test_blocks_that_sinks_do_not_fill_cost_no_key(
    num_sink, budget, num_recent, block_k, tokens, backend
):
    n = num_sink + budget + num_recent
    q, k, v = draw(backend, n, n)
    q = q if tokens is None else q[:, -tokens:]
    got = hip_attention(
        q, k, v, num_sink=num_sink, budget=budget, num_recent=num_recent, block_k=block_k,
        block_q=4, return_lse=True, backend=backend,
    )  # fmt: skip
    close(got, tm.attention(q, k, v, causal=True, return_lse=True, backend="reference"))


@each_backend
@pytest.mark.parametrize("causal", [True, False])
def test_prefill_is_selection_then_block_sparse_attention(backend, causal):
    q, k, v = draw(backend, 50, 70)
    sizes = SIZES if causal else SIZES | {"num_recent": 0}
    ours = hip_attention(
        q, k, v, **sizes, causal=causal, softcap=3.0, return_lse=True, backend=backend
    )
    lists = tm.hip_block_select(q, k, **sizes, causal=causal, backend=backend)
    attended = {n: sizes[n] for n in ("block_q", "block_k", "num_sink", "num_recent")}
    want = tm.block_sparse_attention(
        q, k, v, *lists, **attended, causal=causal, softcap=3.0, return_lse=True, backend=backend
    )
    for a, b in zip(ours, want, strict=True):
        assert torch.equal(a, b)


@each_backend
@pytest.mark.parametrize("tokens", [1, 3])
def test_decoding_is_prefill_of_the_last_rows(backend, tokens):
    q, k, v = draw(backend, tokens, 90)
    lengths = torch.tensor([90, 61], dtype=torch.int32, device=q.device)
    ours = hip_attention(
        q, k, v, **SIZES, seqlens_k=lengths, return_lse=True, scale=0.3, backend=backend
    )
    lists = tm.hip_block_select(q, k, **SIZES, seqlens_k=lengths, backend=backend)
    attended = {n: SIZES[n] for n in ("block_q", "block_k", "num_sink", "num_recent")}
    want = tm.block_sparse_attention(
        q, k, v, *lists, **attended, causal=True, seqlens_k=lengths, return_lse=True, scale=0.3,
        backend=backend,
    )  # fmt: skip
    close(ours, want)


@each_backend
@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_hold_what_a_cache_holds(backend, page_size):
    q, k, v = draw(backend, 1, 64)
    lengths = torch.tensor([64, 33], dtype=torch.int32, device=q.device)
    pages = 64 // page_size
    order = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(1)).to(q.device)
    table = order.int().view(2, pages)
    paged = []
    for t in (k, v):
        cache = torch.empty_like(t).view(2 * pages, page_size, *t.shape[2:])
        cache[order] = t.reshape(2 * pages, page_size, *t.shape[2:])
        paged.append(cache)
    options = {**SIZES, "seqlens_k": lengths, "return_lse": True, "backend": backend}
    close(hip_attention(q, *paged, block_table=table, **options), hip_attention(q, k, v, **options))


@each_backend
def test_lists_serve_an_interval_and_new_tokens_are_seen(backend, monkeypatch):
    searches = []
    module = sys.modules["tokenmill.sparse.hip_attention"]  # the function hides the module's name
    search = module.hip_block_select
    monkeypatch.setattr(
        module,
        "hip_block_select",
        lambda *args, **options: searches.append(1) or search(*args, **options),
    )
    q, k, v = draw(backend, 1, 80)
    lists, ages = HipLists(), []
    for n in range(70, 77):
        lengths = torch.tensor([n, n], dtype=torch.int32, device=q.device)
        v[:, n - 1] = 1e6  # newest key, which no list holds
        out = hip_attention(
            q, k, v, **SIZES, seqlens_k=lengths, lists=lists, refresh_interval=3, backend=backend
        )
        ages.append(lists.age)
        v[:, n - 1] = 0.0
        assert (out > 1).all()
    assert ages == [1, 2, 3, 1, 2, 3, 1] and len(searches) == 3


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("refresh_interval: must be 1 to num_recent, 8; got 9", {"refresh_interval": 9}),
        ("refresh_interval: requires lists; got 2", {"lists": None, "refresh_interval": 2}),
        ("lists: must be a HipLists or None; got 3", {"lists": 3}),
        ("lists: are for decoding: causal, up to 8 queries; got False", {"causal": False}),
        ("budget: ", {"budget": 17}),
        ("block_q: must be an integer; got 16", {"block_q": 16.0}),
        ("hip_attention: seqlens_k: must be a tensor or None; got 3", {"seqlens_k": 3}),
    ],
)
def test_bad_calls_are_refused(message, changes):
    q, k, v = draw("cpu", 1, 40)
    with pytest.raises(RuntimeError, match=r"tokenmill\.hip") as raised:
        hip_attention(q, k, v, **{**SIZES, "lists": HipLists(), **changes})
    assert message in str(raised.value)


@pytest.mark.parametrize(("form", "backend"), forms(backends("reference")))
def test_a_request_has_the_bits_that_it_has_alone(form, backend):
    """The result also equals prefill; rows outside all requests are empty."""
    requests = Requests(form, backend)
    out, lse = hip_attention(
        *requests.tensors, **SIZES, **requests.options, return_lse=True, backend=backend
    )
    lse = lse.transpose(-1, -2)
    taken = torch.zeros_like(lse[..., 0])
    for b, (q, k, v) in enumerate(requests.alone):
        own = requests.rows(b)
        prefill = hip_attention(
            q, k, v, **SIZES, seqlens_k=torch.tensor([k.shape[1]], dtype=torch.int32).to(q.device),
            return_lse=True, backend=backend,
        )  # fmt: skip
        close((out[own], lse[own]), (prefill[0][0], prefill[1][0].T))
        taken[own] = 1
    assert (out[taken == 0] == 0).all() and (lse[taken == 0] == -torch.inf).all()
    again = Requests(form, backend, only=0)
    alone = hip_attention(*again.tensors, **SIZES, **again.options, backend=backend)
    assert_same(alone[again.rows(0)], out[requests.rows(0)], backend)


@each_backend
def test_right_padding_has_gradients_and_hides_what_it_holds(backend):
    requests = Requests("padded", backend)
    q, k, v = (t.requires_grad_() for t in requests.tensors)
    out = hip_attention(q, k, v, **SIZES, **requests.options, backend=backend)
    got = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for b in (0, 2):  # other requests are prefills
        leaves = [t.requires_grad_() for t in requests.alone[b]]
        alone = hip_attention(*leaves, **SIZES, backend=backend)
        want = torch.autograd.grad(alone, leaves, torch.ones_like(alone))
        close([t[b, : w.shape[1]] for t, w in zip(got, want, strict=True)], [w[0] for w in want])
    assert not any(t.isnan().any() for t in got)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("causal: must be True with pages or packed tokens; got False", {"causal": False}),
        ("max_seqlen_q: must be at least the longest sequence, 27; got 26", {"max_seqlen_q": 26}),
        ("max_seqlen_k: must not be negative; got -1", {"max_seqlen_k": -1}),
        ("max_seqlen_k: requires cu_seqlens_k", {"max_seqlen_k": 9, "cu_seqlens_k": None}),
        ("lists: are for decoding: causal, up to 8 queries; got False", {"lists": HipLists()}),
        ("cu_seqlens_k: must have the length of cu_seqlens_q", {"cu_seqlens_k": ints(0)}),
        (
            "hip_attention: cu_seqlens_k: must be a tensor or None; got [0.5]",
            {"cu_seqlens_k": [0.5], "max_seqlen_k": 9},
        ),
    ],
)
def test_bad_packed_calls_are_refused(message, changes):
    requests = Requests("packed", "cpu")
    q, k, v = requests.tensors
    if changes.get("cu_seqlens_k", 0) is None:
        k, v = k[None], v[None]
    with pytest.raises(RuntimeError, match=r"tokenmill\.hip") as raised:
        hip_attention(q, k, v, **{**SIZES, **requests.options, **changes})
    assert message in str(raised.value)
