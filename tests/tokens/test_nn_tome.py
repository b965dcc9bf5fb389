"""TokenMerging against a literal reading of ToMe with scatter_reduce and a matrix of sources."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm


def literal_step(x, metric, size, matrix, r, class_token, distill_token):
    """Sizes [B, N, 1] and sources [B, N, N0], both merged as x is; rows in the order of the paper,
    except that remaining tokens are ordered by index."""
    tokens = x.shape[1]
    r = min(r, (tokens - class_token - distill_token) // 2)
    if r <= 0:
        return x, size, matrix
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if class_token:
        scores[:, 0] = -torch.inf
    if distill_token:
        scores[:, :, 0] = -torch.inf
    best, partner = scores.max(-1)
    edges = best.argsort(dim=-1, descending=True)
    left = edges[:, r:, None].sort(1).values
    gone = edges[:, :r, None]
    to = partner[..., None].gather(1, gone)

    def merge(t):
        source, target = t[:, ::2], t[:, 1::2]
        stay = source.gather(1, left.expand(-1, -1, t.shape[2]))
        source = source.gather(1, gone.expand(-1, -1, t.shape[2]))
        target = target.scatter_add(1, to.expand(-1, -1, t.shape[2]), source)
        if distill_token:
            return torch.cat([stay[:, :1], target[:, :1], stay[:, 1:], target[:, 1:]], 1)
        return torch.cat([stay, target], 1)

    merged, sizes = merge(x * size), merge(size)
    return merged / sizes, sizes, merge(matrix)


@each_backend
@examples(8)
@given(
    tokens=st.integers(4, 40),
    rs=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    tokens_in_front=st.sampled_from([(False, False), (True, False), (True, True)]),
    seed=st.integers(0, 2**31),
)
def test_layers_of_tome(tokens, rs, tokens_in_front, seed, backend):
    class_token, distill_token = tokens_in_front
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 12, generator=g).to(device_of(backend)).requires_grad_()
    y, size, source = x, None, None
    want, sizes = x, x.new_ones(2, tokens, 1)
    matrix = torch.eye(tokens).to(x).expand(2, -1, -1)
    for r in rs:
        keys = torch.randn(2, y.shape[1], 3, 8, generator=g).to(x)
        merge = tm.nn.TokenMerging(
            r, class_token=class_token, distill_token=distill_token, backend=backend
        )
        y, size, source = merge(y, keys, size, source)
        want, sizes, matrix = literal_step(
            want, keys.mean(2), sizes, matrix, r, class_token, distill_token
        )
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(size, sizes[..., 0])
    assert torch.equal(source.long(), matrix.argmax(1))
    spread = merge.unmerge(y, source)
    torch.testing.assert_close(spread, matrix.transpose(1, 2) @ want, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(spread.shape, generator=g).to(x)
    got = torch.autograd.grad(spread, x, cotangent)[0]
    wanted = torch.autograd.grad(matrix.transpose(1, 2) @ want, x, cotangent)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@each_backend
def test_protected_tokens_stay_in_front(backend):
    x = torch.arange(20.0).view(1, 10, 2).to(device_of(backend))
    metric = torch.ones(1, 10, 4, device=x.device)  # everything is equal
    o = {"distill_token": True, "backend": backend}
    y, size, source = tm.nn.TokenMerging(4, **o)(x, metric)
    assert y.shape == (1, 6, 2)
    assert torch.equal(y[:, :2], x[:, :2])
    assert size[0, :2].tolist() == [1, 1]
    assert source[0, :2].tolist() == [0, 1]
    torch.testing.assert_close((size[..., None] * y).sum(1), x.sum(1))


@each_backend
def test_attention_to_merged_duplicates_is_attention_to_all(backend):
    g = torch.Generator().manual_seed(0)
    device = device_of(backend)
    keys, values = (torch.randn(1, 6, 2, 8, generator=g).to(device) for _ in range(2))
    both = [t.repeat_interleave(2, 1) for t in (keys, values)]  # tokens 2 i and 2 i + 1 are equal
    q = torch.randn(1, 5, 2, 8, generator=g).to(device)
    merge = tm.nn.TokenMerging(6, class_token=False, backend=backend)
    x = torch.cat([t.flatten(2) for t in both], 2)
    y, size, _ = merge(x, x)
    assert size.tolist() == [[2.0] * 6]
    k, v = (t.unflatten(2, (2, 8)).contiguous() for t in y.chunk(2, 2))
    bias = merge.attention_bias(size)
    got = tm.attention(q, k, v, bias=bias, backend="reference")
    torch.testing.assert_close(got, tm.attention(q, *both, backend="reference"))


def test_compiles_as_one_graph():
    x, keys = torch.randn(2, 20, 8), torch.randn(2, 20, 2, 4)
    layer = tm.nn.TokenMerging(4, distill_token=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, keys), layer(x, keys), strict=True):
        assert torch.equal(got, want)


def test_a_threshold_merges_what_is_alike():
    x = torch.eye(6).repeat(2, 1, 1)
    x[0, 2] = x[0, 3]  # one pair, in one of the sequences
    merge = tm.nn.TokenMerging(3, class_token=False, threshold=0.9)
    y, size, source = merge(x, x)
    assert size.tolist() == [[1, 1, 1, 2, 1, 0], [1] * 6]
    assert torch.equal(merge.unmerge(y, source), x)
    bias = merge.attention_bias(size)
    assert bias[0, 0, 0, 5] == -torch.inf


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r": -1}, "r: must not be negative; got -1"),
        ({"r": 0.5}, "r: must be an integer; got 0.5"),
        ({"class_token": False, "distill_token": True},
         "distill_token: requires class_token; got True"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, error):
    with pytest.raises(RuntimeError, match=rf"tokenmill\.nn\.TokenMerging: {error}"):
        tm.nn.TokenMerging(**{"r": 2} | options)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"x": torch.zeros(4, 3)}, "x: must have 3 dimensions [B, N, C]; got 2"),
        ({"metric": torch.zeros(2, 4, 3)}, "metric: must have shape [2, 5, D] or"),
        ({"size": torch.zeros(2, 4)}, "size: must have shape [2, 5]; got [2, 4]"),
        ({"source": torch.zeros(1, 9)}, "source: must have shape [2, N0]; got [1, 9]"),
    ],
)
def test_bad_inputs_are_refused(arguments, error):
    good = {"x": torch.zeros(2, 5, 3), "metric": torch.zeros(2, 5, 3)}
    with pytest.raises(RuntimeError) as info:
        tm.nn.TokenMerging(1)(**good | arguments)
    assert str(info.value).startswith(f"tokenmill.nn.TokenMerging: {error}")
