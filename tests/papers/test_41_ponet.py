"""PoNetMixing against the released mixing (lxchtan/PoNet at cc9a29a, attention_ponet.py), token by
token: the mean query attends to the keys, which are the values too; maxima of segments and of three
neighbors exclude padding.

The release for the Long Range Arena cuts N tokens into equal segments of N // number + 1. Here
segments are an argument, built from boundaries such as sentence ends."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from tensors import every_backend
from torch.utils.flop_counter import FlopCounterMode

from tokenmill import nn


def released(layer, x, segments):
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        there = [i for i in range(x.shape[1]) if segments[b, i] >= 0]
        if not there:
            continue
        heads = layer.num_heads
        mean = layer.query(x[b, there]).mean(0).view(heads, -1)
        keys = layer.key(x[b, there]).view(len(there), heads, -1)
        a = torch.softmax(torch.einsum("hd,jhd->jh", mean, keys) * keys.shape[2] ** -0.5, 0)
        g = torch.einsum("jh,jhd->hd", a, keys).flatten()
        pooled = [i for i in there if i > 0 or not layer.exclude_first]
        zero = x.new_zeros(x.shape[2])
        for i in there:
            same = [layer.segment(x[b, j]) for j in pooled if segments[b, j] == segments[b, i]]
            near = [layer.local(x[b, j]) for j in pooled if abs(j - i) <= 1]
            high, local = (torch.stack(t).amax(0) if t else zero for t in (same, near))
            out[b, i] = (g + high) * layer.output(x[b, i]) + local
    return out


@every_backend
@pytest.mark.parametrize("exclude_first", [False, True])
def test_tokens_are_mixed_as_released(exclude_first, backend):
    g = torch.Generator().manual_seed(1)
    device = device_of(backend)
    x = torch.randn(3, 11, 12, generator=g).to(device).requires_grad_()
    ends = torch.rand(3, 11, generator=g) < 0.3
    mask = torch.arange(11) < torch.tensor([[11], [6], [0]])
    segments = nn.segments_of(ends, mask).to(device)
    layer = nn.PoNetMixing(12, 3, exclude_first=exclude_first, backend=backend).to(device)
    found, wanted = layer(x, segments), released(layer, x, segments)
    torch.testing.assert_close(found, wanted)
    leaves = [x, *layer.parameters()]
    gradients = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_boundaries_are_segments_of_their_own():
    ends = torch.tensor([[True, False, False, True, True, False], [False] * 6])
    assert nn.segments_of(ends).tolist() == [[0, 1, 1, 2, 3, 4], [0] * 6]


def operations_of(module, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def test_operations_of_a_token():
    """Operations per token do not grow with the length; at 4096 tokens of 768 channels they are a
    third of self-attention with its projections."""
    layer = nn.PoNetMixing(768, 12).to("meta")
    counted = {}
    for tokens in (512, 4096):
        x = torch.empty(1, tokens, 768, device="meta")
        segments = torch.empty(1, tokens, dtype=torch.int32, device="meta")
        counted[tokens] = operations_of(layer, x, segments) / tokens
    assert abs(counted[4096] / counted[512] - 1) < 0.01
    attention = (4 * 2 * 768**2 + 4 * 4096 * 768) * 1.0
    assert 0.3 < counted[4096] / attention < 0.36
