"""LeanAttention: the tiles of all heads and requests in equally long ranges, partial results
rescaled to a common maximum and added up."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import device_of
from tensors import close, draw, each_backend

import tokenmill as tm

LENGTHS, H, D, TILE, WORKERS = (70, 9, 121), 3, 16, 8, 5


def streamed(q, k, v):
    """[B, H, D] of the last queries, as section 4 computes it."""
    tiles = [
        (b, h, first)
        for b, n in enumerate(LENGTHS)
        for h in range(H)
        for first in range(0, n, TILE)
    ]
    share = math.ceil(len(tiles) / WORKERS)
    partial: dict[tuple[int, int], list] = {}
    for worker in range(WORKERS):
        running = {}  # output -> maximum, sum, numerator
        for b, h, first in tiles[worker * share : (worker + 1) * share]:
            rows = slice(first, min(first + TILE, LENGTHS[b]))
            z = k[b, rows, h] @ q[b, h] * D**-0.5
            m, total, o = running.get((b, h), (-math.inf, 0.0, torch.zeros(D, dtype=q.dtype)))
            top = max(m, float(z.max()))
            p, shrink = torch.exp(z - top), math.exp(m - top)
            running[b, h] = (top, shrink * total + float(p.sum()), shrink * o + p @ v[b, rows, h])
        for output, state in running.items():
            partial.setdefault(output, []).append(state)
    out = torch.empty_like(q)
    for (b, h), states in partial.items():
        top = max(m for m, _, _ in states)
        total = sum(math.exp(m - top) * s for m, s, _ in states)
        out[b, h] = sum(math.exp(m - top) * o for m, _, o in states) / total
    return out


@pytest.mark.parametrize("schedule", ["stream_k", "auto"])
@each_backend
def test_ranges_of_equal_length(schedule, backend):
    shape = (len(LENGTHS), max(LENGTHS), H, D)
    q, k, v = (t.detach() for t in draw(backend, (len(LENGTHS), 1, H, D), shape, shape))
    want = streamed(*(t.cpu().double() for t in (q[:, 0], k, v)))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device_of(backend))
    got = tm.attention_decode(q, k, v, seqlens_k=lengths, schedule=schedule, backend=backend)
    close(got[:, 0].cpu(), want)


@each_backend
def test_softmax_rescaling_is_associative(backend):
    outs, lses = (t.detach() for t in draw(backend, (3, 1, 2, H, D), (3, 1, H, 2)))
    whole, total = tm.merge_attention_states(outs, lses, backend=backend)
    first, lse = tm.merge_attention_states(outs[:2], lses[:2], backend=backend)
    both = torch.stack([first, outs[2]]), torch.stack([lse, lses[2]])
    out, again = tm.merge_attention_states(*both, backend=backend)
    close(out, whole)
    close(again, total)
