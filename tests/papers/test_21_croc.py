"""Croc: visual tokens see each other, text sees what is before it."""

from __future__ import annotations

import torch
from conftest import device_of
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

FIRST, VISUAL, S, H, D = 3, 9, 20, 4, 16  # text, then an image, then text


@each_backend
def test_mixed_attention(backend):
    q, k, v = leaves = draw(backend, (1, S, H, D), (1, S, 2, D), (1, S, 2, D))
    image = range(FIRST, FIRST + VISUAL)
    rows = []
    for i in range(S):
        seen = [j for j in range(S) if j <= i or (i in image and j in image)]
        for h in range(H):
            p = torch.softmax(k[0, seen, h // 2] @ q[0, i, h] * D**-0.5, 0)
            rows.append(p @ v[0, seen, h // 2])
    want = torch.stack(rows).view(1, S, H, D)
    visual = torch.zeros(S, dtype=torch.bool)
    visual[FIRST : FIRST + VISUAL] = True
    visible = torch.ones(S, S, dtype=torch.bool).tril() | (visual[:, None] & visual)
    got = tm.attention(q, k, v, bias=visible.to(device_of(backend)), backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)
