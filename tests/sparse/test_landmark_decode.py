"""landmark_decode against explicit weights and the last row of landmark_attention; over pages, with
the bits of a dense cache."""

from __future__ import annotations

import importlib

import pytest
import torch
from block_sparse_calls import gradients
from conftest import assert_same, backends
from each import each_backend, ints
from hypothesis import given
from hypothesis import strategies as st
from landmark_calls import inputs, weights_of
from tier import examples
from torch.utils._python_dispatch import TorchDispatchMode

import tokenmill as tm

BEHIND = (-1, -(2**31), 2**31 - 1, 1000)  # ids beyond the lengths


def with_room(t, length):
    return torch.nn.functional.pad(t, (0, 0, 0, 0, 0, length - t.shape[1]), value=torch.nan)


def in_pages(k, v, lengths, page_size, behind=-1):
    """k and v [B, S, ...] in pages in any order, and a block_table with room for more. Beyond the
    lengths, pages are NaN and ids are `behind`."""
    held = k.shape[1] // page_size + 1
    k, v = (with_room(t, held * page_size) for t in (k, v))
    places = torch.randperm(len(k) * held + 2, generator=torch.Generator().manual_seed(1))
    table = places[: len(k) * held].view(len(k), held).to(k.device)
    last = (lengths.long()[:, None] + page_size - 1) // page_size
    used = torch.arange(held, device=k.device) < last
    caches = []
    for t in (k, v):
        pages = t.new_full((len(k) * held + 2, page_size, *t.shape[2:]), torch.nan)
        pages[table[used]] = t.unflatten(1, (held, page_size))[used]
        caches.append(pages)
    return (*caches, table.where(used, behind).int())


@each_backend
@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "pages"])
def test_decoding_over_all_blocks_is_the_last_row(page_size, backend):
    q, k, v = (t.detach() for t in inputs(backend, 40, b=3))
    lengths = torch.tensor([40, 17, 24], dtype=torch.int32, device=q.device)
    rows = lengths.long() - 1
    batch = torch.arange(3, device=q.device)
    cache = (k, v, None) if page_size is None else in_pages(k, v, lengths, page_size)
    got = tm.landmark_decode(
        q[batch, rows][:, None], *cache[:2], seqlens_k=lengths, block_table=cache[2], block=8,
        return_lse=True, backend=backend,
    )  # fmt: skip
    out, lse = tm.landmark_attention(q, k, v, block=8, return_lse=True, backend=backend)
    torch.testing.assert_close(got[0][:, 0], out[batch, rows])
    torch.testing.assert_close(got[1][:, :, 0], lse[batch, :, rows])


@each_backend
def test_decoding_retrieves_the_blocks_of_the_greatest_landmarks(backend):
    q, k, v = (t.detach() for t in inputs(backend, 43, b=1))
    row = q[:, -1:]
    lengths = torch.tensor([43], dtype=torch.int32, device=q.device)
    options = {"seqlens_k": lengths, "block": 8, "topk": 2, "backend": backend}
    got = tm.landmark_decode(row, k, v, **options)
    for h in range(4):
        z = 8**-0.5 * k[0, :, h // 2] @ row[0, 0, h]
        best = z[7:40:8].topk(2).indices.tolist()
        w, _ = weights_of(z, 42, 8, best)
        torch.testing.assert_close(got[0, 0, h], w @ v[0, :, h // 2], rtol=3e-5, atol=3e-5)


@each_backend
@pytest.mark.parametrize("length", [0, 1, 2])
def test_requests_with_hardly_a_key(length, backend):
    q, k, v = (t.detach() for t in inputs(backend, 4, b=1))
    lengths = torch.tensor([length], dtype=torch.int32, device=q.device)
    k[:, length:] = torch.nan
    out, lse = tm.landmark_decode(
        q[:, :1], k, v, seqlens_k=lengths, block=2, return_lse=True, backend=backend
    )
    want = torch.zeros_like(out) if length == 0 else v[:, :1].repeat_interleave(2, 2)
    torch.testing.assert_close(out, want)
    assert bool((lse == -torch.inf).all()) == (length == 0)


@each_backend
@examples(4)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=2),
    page_size=st.sampled_from([1, 2, 16]),
    block=st.sampled_from([3, 5, 64]),
    topk=st.sampled_from([None, 1, 2, 50]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    behind=st.sampled_from(BEHIND),
    seed=st.integers(0, 2**31),
)
def test_pages_give_the_bits_of_a_dense_cache(
    lengths, page_size, block, topk, heads, behind, seed, backend
):
    length = max(*lengths, 1)
    q, k, v = (t.detach() for t in inputs(backend, length, *heads, b=len(lengths), seed=seed))
    n = ints(*lengths).to(q.device)
    options = {"seqlens_k": n, "block": block, "topk": topk, "return_lse": True}
    *pages, table = in_pages(k, v, n, page_size, behind)
    want = tm.landmark_decode(q[:, :1], k, v, **options, backend=backend)
    got = tm.landmark_decode(q[:, :1], *pages, **options, block_table=table, backend=backend)
    assert_same(got, want, backend)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(dtype, b) for dtype in (torch.float16, torch.bfloat16) for b in backends("reference")]
    + [(torch.float64, b) for b in backends("reference") if b == "reference"],
)
def test_pages_of_other_dtypes_and_layouts(dtype, backend):
    """Pages [P, Hk, page_size, D] are passed as their transpose."""
    q, k, v = (t.detach() for t in inputs(backend, 48, dtype=dtype))
    n = ints(41, 16).to(q.device)
    options = {"seqlens_k": n, "block": 5, "topk": 3, "return_lse": True, "backend": backend}
    want = tm.landmark_decode(q[:, :1], k, v, **options)
    *pages, table = in_pages(k, v, n, 16)
    turned = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in pages)
    got = tm.landmark_decode(q[:, :1], *turned, **options, block_table=table)
    assert_same(got, want, backend)


@each_backend
@pytest.mark.parametrize("topk", [1, None])
def test_gradients_reach_pages_that_were_read(topk, backend):
    q, k, v = inputs(backend, 20, b=2)
    n = ints(20, 9).to(q.device)
    options = {"seqlens_k": n, "block": 3, "topk": topk, "backend": backend}
    want = gradients([tm.landmark_decode(q[:, :1], k, v, **options)], [q, k, v])
    *pages, table = in_pages(k, v, n, 4)
    out = tm.landmark_decode(q[:, :1], *pages, **options, block_table=table)
    got = gradients([out], [q, k, v])
    for a, b in zip(got, want, strict=True):
        assert b.any() and b.isfinite().all()
        torch.testing.assert_close(a, b)


def test_no_cache_without_pages_or_entries():
    q, k, v = (t.detach() for t in inputs("cpu", 4))
    options = {"seqlens_k": ints(0, 0), "block": 2, "backend": "reference"}
    for pages, table in ((0, ints((1, 2), (3, 4))), (4, ints((), ()).view(2, 0))):
        caches = (t[:1].expand(pages, -1, -1, -1) if pages else t[:0] for t in (k, v))
        out = tm.landmark_decode(q[:, :1], *caches, **options, block_table=table)
        assert not out.any()


class Largest(TorchDispatchMode):
    """Records the maximum number of elements that an operator returned in new memory."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None:
            self.found = max(self.found, out.numel())
        return out


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "pages"])
def test_no_more_of_the_cache_is_copied_than_blocks_and_landmarks(paged):
    q, k, v = (t.detach() for t in inputs("cpu", 8192, d=16, dv=16))
    n = ints(8192, 8000)
    options = {"block_table": torch.arange(2 * 512).view(2, 512).int()} if paged else {}
    k, v = (t.reshape(-1, 16, *t.shape[2:]) if paged else t for t in (k, v))
    with Largest() as largest:
        tm.landmark_decode(
            q[:, :1], k, v, seqlens_k=n, block=16, topk=2, backend="reference", **options
        )
    assert largest.found <= k.numel() // 16


def test_where_no_value_is_read_none_leads_out_of_the_cache(monkeypatch):
    """As on a GPU, lengths are clamped and a page that does not exist is read as page 0."""
    q, k, v = (t.detach() for t in inputs("cpu", 8, b=1))
    module = importlib.import_module("tokenmill.sparse.landmark_decode")  # the module
    monkeypatch.setattr(module, "reads_values", lambda t: False)
    caches = [t.view(4, 2, *t.shape[2:]) for t in (k, v)]
    options = {"block": 3, "backend": "reference"}
    want, got = (
        tm.landmark_decode(q[:, :1], *caches, seqlens_k=ints(n), block_table=ints(row), **options)
        for n, row in ((8, (1, 0, 3, 0)), (99, (1, 4, 3, -7)))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"topk": 0}, "topk: must be at least 1; got 0"),
        ({"seqlens_k": torch.tensor([9, 10]).int()},
         "seqlens_k: must be 0 to what the cache holds of a request, 9; got 10"),
        ({"seqlens_k": torch.tensor([9]).int()}, r"seqlens_k: must have shape \[2\]"),
        ({"q": torch.zeros(2, 4, 8)}, r"q: must have 4 dimensions \[B, Sq, H, D\]; got 3"),
    ],
)  # fmt: skip
def test_bad_steps_are_refused(edit, message):
    q, k, v = (t.detach() for t in inputs("cpu", 9))
    lengths = torch.tensor([9, 9], dtype=torch.int32)
    arguments = {"q": q[:, :1], "k_cache": k, "v_cache": v, "seqlens_k": lengths, "block": 4}
    with pytest.raises(tm.InputError, match=rf"^tokenmill\.landmark_decode: {message}"):
        tm.landmark_decode(**{**arguments, **edit})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"block_table": ints((0, 1, 2), (3, 4, 5))},
         "block_table: must name pages below 5 where keys lie; got 5"),
        ({"block_table": ints((0, -1, 2), (3, 4, 9))},
         "block_table: must name pages below 5 where keys lie; got -1"),
        ({"block_table": ints((0, 1), (3, 4))},
         "seqlens_k: must be 0 to what the cache holds of a request, 8; got 9"),
        ({"block_table": ints(0, 1)}, r"block_table: must have shape \[2, pages\]; got \[2\]"),
        ({"block_table": ints((0, 1, 2)).view(1, 3)},
         r"block_table: must have shape \[2, pages\]; got \[1, 3\]"),
        ({"block_table": torch.zeros(2, 3).long()}, "block_table: must be int32; got int64"),
        ({"block_table": [[0, 1]]}, "block_table: must be a tensor or None"),
        ({"k_cache": torch.zeros(5, 3, 2, 8), "v_cache": torch.zeros(5, 3, 2, 12)},
         "k_cache: must have pages of a power of two of tokens; got 3"),
        ({"v_cache": torch.zeros(4, 4, 2, 12)}, "v_cache: must have the shape of k_cache up to"),
        ({"seqlens_k": ints(3, -1)},
         "seqlens_k: must be 0 to what the cache holds of a request, 12; got -1"),
    ],
)  # fmt: skip
def test_bad_pages_are_refused(edit, message):
    """attention_decode gives the same messages."""
    g = torch.Generator().manual_seed(0)
    arguments = {
        "q": torch.randn(2, 1, 4, 8, generator=g),
        "k_cache": torch.randn(5, 4, 2, 8, generator=g),
        "v_cache": torch.randn(5, 4, 2, 12, generator=g),
        "seqlens_k": ints(9, 12),
        "block_table": ints((0, 1, 2), (3, 4, 0)),
    }
    assert tm.landmark_decode(**arguments, block=4).isfinite().all()
    for function, options in ((tm.landmark_decode, {"block": 4}), (tm.attention_decode, {})):
        words = rf"^tokenmill\.{function.__name__}: {message}"
        with pytest.raises(RuntimeError, match=words):
            function(**{**arguments, **edit}, **options)
