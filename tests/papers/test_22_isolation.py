"""IR-Diffusion: subjects that do not see each other, and references moved on their grid."""

from __future__ import annotations

import torch
from conftest import device_of
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

SIDE, H, D = 5, 2, 16
BACKGROUND = 0


@each_backend
def test_isolation_and_reposition(backend):
    tokens = SIDE * SIDE
    q, k, v = leaves = draw(backend, (1, tokens, H, D), (1, tokens, H, D), (1, tokens, H, D))
    g = torch.Generator().manual_seed(0)
    subject = torch.randint(0, 3, (tokens,), generator=g)
    move = (1, 2)  # rows and columns by which references are out of place
    rows = []
    for i in range(tokens):
        seen = [
            j
            for j in range(tokens)
            if BACKGROUND in (subject[i], subject[j]) or subject[i] == subject[j]
        ]
        at = [
            (j // SIDE + move[0]) % SIDE * SIDE + (j % SIDE + move[1]) % SIDE
            for j in seen
        ]  # fmt: skip
        for h in range(H):
            p = torch.softmax(k[0, at, h] @ q[0, i, h] * D**-0.5, 0)
            rows.append(p @ v[0, at, h])
    want = torch.stack(rows).view(1, tokens, H, D)
    device = device_of(backend)
    cells = torch.arange(tokens, device=device).view(SIDE, SIDE)
    source = cells.roll((-move[0], -move[1]), (0, 1)).flatten()[None].int()
    keys, values = tm.gather_tokens((k.flatten(2), v.flatten(2)), source, backend=backend)
    mask = tm.masks.segments(subject.int()[None].to(device), shared=BACKGROUND)
    got = tm.attention(
        q, keys.unflatten(2, (H, D)), values.unflatten(2, (H, D)), mask=mask, backend=backend
    )
    close(got, want)
    same_gradients(got, want, leaves)
