"""HiP Attention at the defaults: the tree search of section 3, then attention to what it found."""

from __future__ import annotations

import itertools

import torch
from tensors import close, draw, each_backend

import tokenmill as tm

S, H, D = 2048, 2, 16
BUDGET, BLOCK_Q, BLOCK_K, STRIDE, SINK, RECENT = 512, 64, 2, 2, 16, 256


def searched(q, k, rows):
    """Blocks of keys for the queries `rows` of one head: nodes are halved, and those stay whose
    middle block has the largest product with a query."""
    speakers = list(reversed(rows))[::STRIDE]
    last = rows[-1] - RECENT  # the last key that is not attended to anyway
    if last < SINK:
        return []
    first, blocks, wanted = SINK // BLOCK_K, last // BLOCK_K + 1, BUDGET // BLOCK_K
    if blocks - first <= wanted:
        return list(range(first, blocks))
    products = q[speakers] @ k.T
    for row, i in enumerate(speakers):
        products[row, :SINK] = products[row, max(i - RECENT + 1, 0) :] = -torch.inf
    best = products.amax(0)
    cuts = [first + (blocks - first) * i // wanted for i in range(wanted + 1)]
    nodes = list(itertools.pairwise(cuts))
    while any(until - begin > 1 for begin, until in nodes):
        branches = []
        for begin, until in nodes:
            middle = (begin + until) // 2
            halves = [(begin, middle), (middle, until)]
            branches += halves if until - begin > 1 else [(begin, until)]
        scores = []
        for begin, until in branches:
            key = (begin + until) // 2 * BLOCK_K
            scores.append(best[key : key + BLOCK_K].amax())
        order = torch.stack(scores).argsort(descending=True, stable=True)[:wanted]
        nodes = [branches[i] for i in sorted(order.tolist())]
    return [begin for begin, _ in nodes]


@each_backend
def test_search_and_attention(backend):
    tensors = [t.detach() for t in draw(backend, (1, S, H, D), (1, S, 1, D), (1, S, 1, D))]
    q, k, v = (t.cpu().double() for t in tensors)
    want = torch.empty_like(q)
    indices = []
    for h in range(H):
        for begin in range(0, S, BLOCK_Q):
            rows = list(range(begin, begin + BLOCK_Q))
            found = searched(q[0, :, h], k[0, :, 0], rows)
            indices.append(found)
            listed = torch.zeros(S, dtype=torch.bool)
            for block in found:
                listed[block * BLOCK_K : (block + 1) * BLOCK_K] = True
            listed[:SINK] = True
            i, j = torch.tensor(rows)[:, None], torch.arange(S)
            visible = (listed | (j > i - RECENT)) & (j <= i)
            z = q[0, rows, h] @ k[0, :, 0].T * D**-0.5
            want[0, rows, h] = z.masked_fill(~visible, -torch.inf).softmax(-1) @ v[0, :, 0]
    assert max(map(len, indices)) == BUDGET // BLOCK_K < (S - SINK - RECENT) // BLOCK_K // 3
    got, counts = (t.cpu() for t in tm.hip_block_select(*tensors[:2], backend=backend))
    lists = zip(got.flatten(0, 2).tolist(), counts.flatten().tolist(), strict=True)
    assert [row[:count] for row, count in lists] == indices
    close(tm.hip_attention(*tensors, backend=backend).cpu(), want)
