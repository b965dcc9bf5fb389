"""Croc: visual tokens see each other, text sees what is before it."""

from __future__ import annotations

import pytest
import torch
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

VISUAL, S, H, D = 9, 20, 4, 16


@each_backend
@pytest.mark.parametrize("first", [0, 3])
def test_mixed_attention(first, backend):
    """Of an image before its text, or between texts."""
    q, k, v = leaves = draw(backend, (1, S, H, D), (1, S, 2, D), (1, S, 2, D))
    image = range(first, first + VISUAL)
    rows = []
    for i in range(S):
        seen = [j for j in range(S) if j <= i or (i in image and j in image)]
        for h in range(H):
            p = torch.softmax(k[0, seen, h // 2] @ q[0, i, h] * D**-0.5, 0)
            rows.append(p @ v[0, seen, h // 2])
    want = torch.stack(rows).view(1, S, H, D)
    end = torch.tensor([image.stop if i in image else i + 1 for i in range(S)]).int()
    mask = tm.masks.ranges(*(t.view(1, 1, S, 1).to(q.device) for t in (torch.zeros_like(end), end)))
    if first == 0:
        mask = tm.masks.prefix(torch.tensor([VISUAL], dtype=torch.int32, device=q.device))
    got = tm.attention(q, k, v, mask=mask, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)
