"""Sigmoid self-attention: O = sigmoid(Q K^T / sqrt(d) + b) V with b = -log n."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

B, N, H, D, DV = 2, 33, 4, 16, 24


@pytest.mark.parametrize("causal", [False, True])
@each_backend
def test_sigmoid_self_attention(causal, backend):
    q, k, v = leaves = draw(backend, (B, N, H, D), (B, N, H, D), (B, N, H, DV))
    z = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D) - math.log(N)
    weights = 1 / (1 + torch.exp(-z))
    if causal:
        weights = weights.tril()
    want = torch.einsum("bhij,bjhd->bihd", weights, v)
    got = tm.sigmoid_attention(q, k, v, causal=causal, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)


@each_backend
def test_alibi_is_added_to_the_logits(backend):
    q, k, v = draw(backend, (B, N, H, D), (B, N, H, D), (B, N, H, DV))
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / H) for h in range(H)], device=q.device)
    place = torch.arange(N, device=q.device)
    z = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D) - math.log(N)
    z = z - slopes[:, None, None] * (place[:, None] - place).abs()
    want = torch.einsum("bhij,bjhd->bihd", torch.sigmoid(z).tril(), v)
    got = tm.sigmoid_attention(q, k, v, causal=True, alibi_slopes=slopes, backend=backend)
    close(got, want)
