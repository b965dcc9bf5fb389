"""HiP Attention at the defaults: the tree search of section 3, then attention to the blocks
found."""

from __future__ import annotations

import itertools

import torch
from tensors import close, draw, each_backend

import tokenmill as tm
from tokenmill import policies

S, H, D = 2048, 2, 16
SHAPES = (1, S, H, D), (1, S, 1, D), (1, S, 1, D)
BUDGET, BLOCK_Q, BLOCK_K, STRIDE, SINK, RECENT = 512, 64, 2, 2, 16, 256


def searched(q, k, rows):
    """Key blocks for the queries `rows` of one head: nodes are halved, and the halves whose middle
    block has the largest product with a query are kept."""
    speakers = list(reversed(rows))[::STRIDE]
    last = rows[-1] - RECENT  # last key outside the recent ones
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
    tensors = [t.detach() for t in draw(backend, *SHAPES)]
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


@each_backend
def test_policy_refreshes_its_lists_every_eight_steps(backend):
    """Layers 0 to 2 are dense. In layer 3 one step searches, and seven more attend to the same
    blocks and to the keys that are recent by then."""
    prompt, steps = 1500, 10
    q, k, v = (t.detach()[:, : prompt + steps] for t in draw(backend, *SHAPES))
    caches = [policies.KVCache.like(k, v, prompt + steps) for _ in range(4)]
    layers = policies.stack(policies.HiP, caches, backend=backend)
    parts = [[t[:, :prompt] for t in (q, k, v)]]
    parts += [[t[:, n : n + 1] for t in (q, k, v)] for n in range(prompt, prompt + steps)]
    dense, sparse = layers[2], layers[3]
    got = [[layer.prefill(*parts[0]) for layer in (dense, sparse)]]
    for part in parts[1:]:
        got.append([layer.step(*part) for layer in (dense, sparse)])
    full = tm.attention(q, k, v, causal=True, backend=backend)
    close(torch.cat([out for out, _ in got], 1), full)
    close(got[0][1], tm.hip_attention(*parts[0], backend=backend))
    q, k, v = (t[0].cpu().double() for t in (q, k, v))
    found = {}
    for t in range(steps):
        n = prompt + t + 1
        want = torch.empty(H, D, dtype=torch.float64)
        for h in range(H):
            if t % 8 == 0:
                found[h] = searched(q[:, h], k[:n, 0], [n - 1])
            blocks = [range(b * BLOCK_K, (b + 1) * BLOCK_K) for b in found[h]]
            seen = {*range(SINK), *itertools.chain(*blocks), *range(n - RECENT, n)}
            row = sorted(seen)
            weights = (k[row, 0] @ q[n - 1, h] * D**-0.5).softmax(0)
            want[h] = weights @ v[row, 0]
        close(got[t + 1][1][0, 0].cpu(), want)
