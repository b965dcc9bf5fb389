"""Imbalanced attention: chosen visual tokens weigh more, by a factor of each head, and rows sum to
one again."""

from __future__ import annotations

import torch
from conftest import device_of
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

S, H, D = 23, 4, 16
CHOSEN = {3, 4, 9, 12}


@each_backend
def test_rows_sum_to_one_again(backend):
    q, k, v, strength = leaves = draw(backend, (1, S, H, D), (1, S, 2, D), (1, S, 2, D), (H,))
    gains = 1 + strength.abs()
    rows = []
    for i in range(S):
        for h in range(H):
            p = torch.softmax(k[0, : i + 1, h // 2] @ q[0, i, h] * D**-0.5, 0)
            raised = [p[j] * gains[h] if j in CHOSEN else p[j] for j in range(i + 1)]
            weights = torch.stack(raised)
            rows.append(weights / weights.sum() @ v[0, : i + 1, h // 2])
    want = torch.stack(rows).view(1, S, H, D)
    groups = torch.tensor([[[int(j in CHOSEN) for j in range(S)]]], device=device_of(backend))
    factors = torch.stack([torch.ones_like(gains), gains], 1)  # [H, 2]
    got = tm.reweighted_attention(
        q, k, v, groups, factors, causal=True, renormalize="all", backend=backend
    )
    close(got, want)
    same_gradients(got, want, leaves)
