"""Based: linear attention with the second-order Taylor map of 16 features, and softmax in a
window."""

from __future__ import annotations

import math

import torch
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

B, S, H, FEATURES, DV, WINDOW = 1, 150, 2, 16, 24, 128


def feature_map(x):
    """[1, x / d^(1/4), vec(x x^T) / sqrt(2 d)]: products are 1 + u + u^2 / 2, u = q.k / sqrt(d)."""
    d = x.shape[-1]
    square = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, square / math.sqrt(2 * d)], -1)


@each_backend
def test_taylor_features_and_their_state(backend):
    q, k, v = leaves = draw(backend, *[(B, S, H, FEATURES)] * 2, (B, S, H, DV))
    fq, fk = feature_map(q), feature_map(k)
    state = torch.zeros(B, H, fk.shape[-1], DV, device=q.device)
    norm = torch.zeros(B, H, fk.shape[-1], device=q.device)
    rows = []
    for t in range(S):
        state = state + fk[:, t, :, :, None] * v[:, t, :, None]
        norm = norm + fk[:, t]
        numerator = torch.einsum("bhf,bhfe->bhe", fq[:, t], state)
        rows.append(numerator / torch.einsum("bhf,bhf->bh", fq[:, t], norm)[..., None])
    want = torch.stack(rows, 1)
    got = tm.linear_attention(q, k, v, feature_map="taylor2", normalize=True, backend=backend)
    close(got, want, 1e-4)
    same_gradients(got, want, leaves, 1e-3)


@each_backend
def test_softmax_in_a_window(backend):
    q, k, v = leaves = draw(backend, *[(B, S, H, FEATURES)] * 2, (B, S, H, DV))
    rows = []
    for i in range(S):
        seen = slice(max(i - WINDOW + 1, 0), i + 1)
        z = torch.einsum("bhd,bjhd->bhj", q[:, i], k[:, seen]) / math.sqrt(FEATURES)
        rows.append(torch.einsum("bhj,bjhe->bhe", z.softmax(-1), v[:, seen]))
    want = torch.stack(rows, 1)
    got = tm.attention(q, k, v, causal=True, window=(WINDOW - 1, 0), backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)
