"""Retrieval heads: how much of a needle a head's largest weights point at while it is copied."""

from __future__ import annotations

import torch
from tensors import draw, each_backend

import tokenmill as tm

HAYSTACK, NEEDLE, AT, H, D = 60, 6, 23, 4, 16


@each_backend
def test_score_of_each_head(backend):
    """Head 0 looks at the token that is copied, head 1 at every second one, others anywhere."""
    g = torch.Generator().manual_seed(0)
    text = torch.randperm(200, generator=g)[:HAYSTACK].tolist()
    needle = range(AT, AT + NEEDLE)
    k, q = (t.detach() for t in draw(backend, (1, HAYSTACK, H, D), (NEEDLE, H, D)))
    for step, j in enumerate(needle):
        q[step, 0] = 20 * k[0, j, 0]
        q[step, 1] = 20 * k[0, j if step % 2 else 0, 1]
    answer = [text[j] for j in needle]
    want = []
    for h in range(H):
        copied = set()
        for step, token in enumerate(answer):
            weights = torch.softmax(k[0, :, h] @ q[step, h] * D**-0.5, 0).tolist()
            j = weights.index(max(weights))
            if j in needle and text[j] == token:
                copied.add(token)
        want.append(len(copied) / len({text[j] for j in needle}))
    weights = tm.attention_row_scores(q[None], k, reduce="none", backend=backend)[0]  # [H, R, S]
    largest = weights.argmax(-1).cpu()
    hits = largest == torch.tensor(needle)
    assert hits.float().mean(1).tolist() == want
    assert want[:2] == [1.0, 0.5] and max(want[2:]) < 0.5
