"""PoolFormerMixing against avg_pool2d, and SegmentPooling against a loop over words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm

LITERAL = {
    "sum": lambda w: w.sum(0),
    "mean": lambda w: w.mean(0),
    "amax": lambda w: w.amax(0),
    "amin": lambda w: w.amin(0),
    "last": lambda w: w[-1],
}


@each_backend
@examples(5)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    size=st.sampled_from([1, 3, 5]),
    channels_first=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_mixing(height, width, size, channels_first, seed, backend):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, height, width, generator=g).to(device_of(backend)).requires_grad_()
    want = F.avg_pool2d(x, size, 1, size // 2, count_include_pad=False) - x
    mixer = tm.nn.PoolFormerMixing(size, channels_first=channels_first, backend=backend)
    if channels_first:
        got = mixer(x)
    else:
        got = mixer(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn(want.shape, generator=g).to(x)
    grads = [torch.autograd.grad(y, x, cotangent)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def words(lengths, backend, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), 6, generator=g).to(device_of(backend))
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(x.device)
    return x, offsets


@each_backend
@examples(5)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=8),
    prefix=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_first_rows_of_words_and_back(lengths, prefix, seed, backend):
    x, offsets = words(lengths, backend, seed)
    x.requires_grad_()
    pool = tm.nn.SegmentPooling(prefix=prefix, backend=backend)
    got = pool(x, offsets)
    assert got.shape == (len(lengths), prefix, 6)
    want = x.new_zeros(got.shape)
    for word, rows in enumerate(x.split(lengths)):
        count = min(prefix, len(rows))
        want[word, :count] = rows[:count]
    assert torch.equal(got, want)
    new = torch.randn_like(got)
    inserted = x.detach().clone()
    starts = offsets.tolist()
    for word in range(1, len(lengths)):
        count = min(prefix, lengths[word])
        inserted[starts[word] : starts[word] + count] = new[word - 1, :count]
    assert torch.equal(pool.insert(x.detach(), offsets, new), inserted)
    if x.numel():
        assert torch.equal(*(torch.autograd.grad((y * new).sum(), x)[0] for y in (got, want)))


@pytest.mark.parametrize("reduce", list(LITERAL))
@each_backend
def test_one_row_of_each_word(reduce, backend):
    x, offsets = words([3, 1, 7], backend)
    got = tm.nn.SegmentPooling(reduce, backend=backend)(x, offsets)
    want = torch.stack([LITERAL[reduce](w) for w in x.split([3, 1, 7])])
    torch.testing.assert_close(got, want[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: tm.nn.PoolFormerMixing(2), "PoolFormerMixing: pool_size: must be odd and"),
        (lambda: tm.nn.PoolFormerMixing()(torch.zeros(2, 3, 4)),
         r"PoolFormerMixing: x: must have 4 dimensions \[B, Y, X, C\]; got 3"),
        (lambda: tm.nn.SegmentPooling("max"), "SegmentPooling: reduce: must be 'first', 'last', "),
        (lambda: tm.nn.SegmentPooling("mean", prefix=2), "SegmentPooling: prefix: must be at"),
        (lambda: tm.nn.SegmentPooling()(torch.zeros(2, 3), torch.zeros(2)),
         "SegmentPooling: offsets: must be int32; got float32"),
        (lambda: tm.nn.SegmentPooling().insert(
            torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1, 3)),
         r"SegmentPooling: words: must have shape \[1, 1, 3\]; got \[2, 1, 3\]"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.{error}"):
        call()
