"""token_select: the candidates with the largest votes."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from each import each_backend, each_kernel
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm


def votes(q, keys, scale, sink, recent, kernel):
    """Votes [candidates] of one request, in float64."""
    mean = (q.float().sum(0) / len(q)).to(q.dtype).double()
    keys = keys[sink : max(len(keys) - recent, sink)].double()
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
    found = (torch.einsum("hd,nhd->hn", mean, keys) * scale).softmax(1).sum(0)
    side = kernel // 2
    around = [found[max(j - side, 0) : j + side + 1].amax() for j in range(len(found))]
    return torch.stack(around) if around else found


@each_backend
@examples(20)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    queries=st.sampled_from([1, 4]),
    heads=st.sampled_from([(2, 1), (4, 2), (6, 1)]),
    sink=st.sampled_from([0, 3, 10]),
    recent=st.sampled_from([0, 5, 16]),
    k=st.sampled_from([1, 8, 100]),
    kernel=st.sampled_from([1, 5]),
    page=st.sampled_from([None, 1, 16]),
)
def test_definition(lengths, queries, heads, sink, recent, k, kernel, page, backend):
    device = device_of(backend)
    batch = len(lengths)
    q = torch.randn(batch, queries, heads[0], 32)
    keys = torch.randn(batch, 96, heads[1], 32)
    options = {"seqlens_k": torch.tensor(lengths, dtype=torch.int32)}
    cache = keys
    if page is not None:
        pages = 96 // page
        options["block_table"] = torch.randperm(batch * pages).int().view(batch, pages)
        cache = torch.empty(batch * pages, page, heads[1], 32)
        cache[options["block_table"].long()] = keys.unflatten(1, (pages, page))
    indices, counts = tm.token_select(
        q.to(device), cache.to(device), k=k, num_sink=sink, num_recent=recent, scale=0.5,
        kernel_size=kernel, **{n: v.to(device) for n, v in options.items()}, backend=backend,
    )  # fmt: skip
    assert indices.shape == (batch, 1, 1, k) and counts.shape == (batch, 1, 1)
    for b, length in enumerate(lengths):
        wanted = votes(q[b], keys[b, :length], 0.5, sink, recent, kernel)
        count = counts[b, 0, 0].item()
        found = indices[b, 0, 0].cpu()
        assert count == min(k, len(wanted))
        assert (found[count:] == -1).all() and found[:count].tolist() == sorted(
            set(found[:count].tolist())
        )
        chosen = torch.zeros(len(wanted), dtype=torch.bool)
        chosen[found[:count].long() - sink] = True
        if 0 < count < len(wanted):  # rounding may swap almost equal votes
            assert wanted[chosen].min() >= wanted[~chosen].max() * (1 - 1e-5)


@each_kernel
def test_a_nan_key_is_not_selected_and_hides_no_other(backend):
    device = device_of(backend)
    q, keys = torch.ones(1, 1, 2, 8, device=device), torch.zeros(1, 40, 1, 8, device=device)
    keys[0, 20:24] = 1
    keys[0, 21] = float("nan")
    indices, counts = tm.token_select(q, keys, k=3, num_sink=2, num_recent=4, backend=backend)
    assert indices.flatten().tolist() == [20, 22, 23] and counts.item() == 3
    indices, _ = tm.token_select(
        q, keys, k=5, num_sink=2, num_recent=4, kernel_size=3, backend=backend
    )
    assert indices.flatten().tolist() == [19, 20, 22, 23, 24]


def test_bad_calls_are_refused():
    q, keys = torch.ones(1, 1, 2, 8), torch.zeros(1, 40, 1, 8)
    with pytest.raises(RuntimeError, match="token_select: vote: must be 'softmax'; got 'hard'"):
        tm.token_select(q, keys, k=3, vote="hard")
    with pytest.raises(RuntimeError, match="token_select: kernel_size: must be odd and 1 to 1023"):
        tm.token_select(q, keys, k=3, kernel_size=4)
    with pytest.raises(RuntimeError, match="topk_select: k: must be 1 to 65536; got 0"):
        tm.token_select(q, keys, k=0)
