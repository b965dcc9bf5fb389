"""EViTReorganize and ClsTokenPruning against literal readings on the attention map."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import device_of
from each import each_backend
from hypothesis import given
from hypothesis import strategies as st
from tier import examples

import tokenmill as tm


def class_row(q, k):
    """Row 0 [B, N] of the whole attention map."""
    z = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return z.softmax(-1)[:, :, 0, 1:].mean(1)


def reorganised(x, scores, keep_rate, fuse):
    """The published module's steps: gather both parts, weigh the rest, concatenate."""
    count = math.ceil(keep_rate * scores.shape[1])
    if count == scores.shape[1]:
        return x, torch.arange(count).expand(len(x), -1)
    keep = scores.topk(count).indices
    channels = x.shape[2]
    patches = x[:, 1:]
    kept = patches.gather(1, keep[..., None].expand(-1, -1, channels))
    if not fuse:
        return torch.cat([x[:, :1], kept], 1), keep
    rest = [sorted(set(range(scores.shape[1])) - set(row)) for row in keep.tolist()]
    rest = torch.tensor(rest, device=x.device)
    others = patches.gather(1, rest[..., None].expand(-1, -1, channels))
    fused = (others * scores.gather(1, rest)[..., None]).sum(1, keepdim=True)
    return torch.cat([x[:, :1], kept, fused], 1), keep


def draw(tokens, seed, backend, heads=3, dim=8, channels=10):
    g = torch.Generator().manual_seed(seed)
    shapes = (channels,), (heads, dim), (heads, dim)
    return [torch.randn(2, tokens, *s, generator=g).to(device_of(backend)) for s in shapes]


@each_backend
@examples(6)
@given(
    tokens=st.integers(2, 40),
    keep_rate=st.sampled_from([0.1, 0.5, 0.7, 1.0]),
    fuse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_evit(tokens, keep_rate, fuse, seed, backend):
    leaves = [t.requires_grad_() for t in draw(tokens, seed, backend)]
    layer = tm.nn.EViTReorganize(keep_rate, fuse=fuse, backend=backend)
    scores = layer.scores(*leaves[1:])
    y, keep = layer(leaves[0], scores)
    want_scores = class_row(*leaves[1:])
    want, places = reorganised(leaves[0], want_scores, keep_rate, fuse)
    assert torch.equal(keep.cpu(), places.int().cpu())
    torch.testing.assert_close(scores, want_scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn_like(want)
    got, wanted = (
        torch.autograd.grad(t, leaves, cotangent, allow_unused=True, retain_graph=True)
        for t in (y, want)
    )
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # by the operator, which has no gradient
        torch.testing.assert_close(layer.scores(*leaves[1:]), scores, rtol=1e-5, atol=1e-6)


@each_backend
def test_a_normalized_fused_token_is_a_mean(backend):
    x, q, k = draw(30, 0, backend)
    x[:, :] = x[:, :1]  # all tokens are equal
    layer = tm.nn.EViTReorganize(0.5, normalize=True, backend=backend)
    y, _ = layer(x, layer.scores(q, k))
    torch.testing.assert_close(y, x[:, : y.shape[1]])


@each_backend
@examples(5)
@given(
    tokens=st.integers(2, 40),
    layers=st.integers(1, 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_pruning(tokens, layers, share, seed, backend):
    keep = int(share * (tokens - 1))
    calls = [draw(tokens, seed + i, backend) for i in range(layers)]
    prune = tm.nn.ClsTokenPruning(keep, backend=backend)
    x = calls[0][0]
    patches, indices = prune(x, [prune.scores(q, k) for _, q, k in calls])
    total = sum(class_row(q, k) for _, q, k in calls)
    places = total.topk(keep).indices.sort(1).values
    assert torch.equal(indices.long(), places)
    assert torch.equal(patches, x[:, 1:].gather(1, places[..., None].expand(-1, -1, 10)))
    one = prune(x, total)
    assert torch.equal(one[1], indices)


def test_grouped_heads_with_a_gradient():
    q, k = torch.randn(2, 9, 6, 8, requires_grad=True), torch.randn(2, 9, 2, 8)
    layer = tm.nn.EViTReorganize()
    want = class_row(q, k.repeat_interleave(3, 2))
    torch.testing.assert_close(layer.scores(q, k), want)
    torch.testing.assert_close(layer.scores(q.detach(), k), want)


@pytest.mark.parametrize("rate", [0, 1.5])
def test_bad_rates_are_refused(rate):
    with pytest.raises(RuntimeError, match="keep_rate: must be above 0 and at most 1; got"):
        tm.nn.EViTReorganize(rate)


@pytest.mark.parametrize(
    ("module", "arguments", "error"),
    [
        (tm.nn.EViTReorganize(), (torch.zeros(5, 3), torch.zeros(1, 4)),
         "nn.EViTReorganize: x: must have shape [B, 1 + N, C]; got [5, 3]"),
        (tm.nn.EViTReorganize(), (torch.zeros(1, 5, 3), torch.zeros(1, 5)),
         "nn.EViTReorganize: scores: must have shape [1, 4], a score for each patch; got [1, 5]"),
        (tm.nn.ClsTokenPruning(5), (torch.zeros(1, 5, 3), torch.zeros(1, 4)),
         "nn.ClsTokenPruning: keep: must be at most the number of patches, 4; got 5"),
        (tm.nn.ClsTokenPruning(2),
         (torch.zeros(1, 5, 3), [torch.zeros(1, 4), torch.zeros(1, 4).to(torch.float8_e4m3fn)]),
         "nn.ClsTokenPruning: scores: must be float16, bfloat16 or float32; got float8_e4m3fn"),
        (tm.nn.ClsTokenPruning(5), (torch.zeros(1, 5, 3), []),
         "nn.ClsTokenPruning: scores: must be a tensor or several; got []"),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused(module, arguments, error):
    with pytest.raises(RuntimeError) as info:
        module(*arguments)
    assert str(info.value).startswith(f"tokenmill.{error}")


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("tokens_q", "tokens_k", "named"), [(0, 3, "q"), (3, 0, "k")])
def test_scores_need_a_class_token(gradients, tokens_q, tokens_k, named):
    q, k = (torch.zeros(1, n, 2, 8, requires_grad=gradients) for n in (tokens_q, tokens_k))
    rule = f"^tokenmill.nn.class_scores: {named}: must begin with a class token; tokens; got 0$"
    with pytest.raises(RuntimeError, match=rule):
        tm.nn.EViTReorganize().scores(q, k)
