"""xAR: tokens see all of their own cell of an image, and of earlier cells, as in the mask of the
release (OliverRensu/xAR at 121e9c9, models/xar.py)."""

from __future__ import annotations

import torch
from conftest import device_of
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

SIDE, CELL, H, D = 6, 2, 2, 16  # an image of 6 x 6 tokens in cells of 2 x 2


@each_backend
def test_attention_that_is_causal_by_cells(backend):
    tokens, across = SIDE * SIDE, SIDE // CELL
    leaves = draw(backend, (1, tokens, H, D), (1, tokens, H, D), (1, tokens, H, D))
    q, k, v = leaves
    cell = [i // SIDE // CELL * across + i % SIDE // CELL for i in range(tokens)]
    rows = []
    for i in range(tokens):
        seen = [j for j in range(tokens) if cell[j] <= cell[i]]
        for h in range(H):
            p = torch.softmax(k[0, seen, h] @ q[0, i, h] * D**-0.5, 0)
            rows.append(p @ v[0, seen, h])
    want = torch.stack(rows).view(1, tokens, H, D)
    ids = torch.tensor([cell], dtype=torch.int32, device=device_of(backend))
    in_place = tm.attention(q, k, v, mask=tm.masks.segments(ids, rule="not_after"), backend=backend)
    close(in_place, want)
    same_gradients(in_place, want, leaves)

    # Cell after cell, in order of generation.
    order = ids.long().argsort(stable=True).int()
    moved = tm.gather_tokens(tuple(x.flatten(2) for x in leaves), order, backend=backend)
    q, k, v = (x.unflatten(2, (H, D)) for x in moved)
    ids = ids.gather(1, order.long())
    behind = tm.attention(q, k, v, mask=tm.masks.segments(ids, rule="not_after"), backend=backend)
    close(behind, want[:, order[0].long()])
