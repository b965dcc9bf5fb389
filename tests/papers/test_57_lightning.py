"""Lightning Attention: blocks with a state, algorithm 1, against the sum over all pairs."""

from __future__ import annotations

import torch
from conftest import device_of
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

B, S, H, D, BLOCK, LAYERS = 2, 75, 4, 16, 32, 12


def by_blocks(q, k, v, decay):
    """One head, q, k, v [S, D]: (O, KV), with the decay raised to every distance."""
    out, state = torch.zeros_like(q), torch.zeros(D, D, dtype=q.dtype)
    for first in range(0, len(q), BLOCK):
        rows = slice(first, first + BLOCK)
        n = len(q[rows])
        i = torch.arange(n, dtype=q.dtype)
        m = torch.where(i[:, None] >= i, decay ** (i[:, None] - i), 0)
        intra = (q[rows] @ k[rows].T * m) @ v[rows]
        inter = decay ** (i + 1)[:, None] * (q[rows] @ state)
        out[rows] = intra + inter
        state = decay**n * state + (decay ** (n - 1 - i)[:, None] * k[rows]).T @ v[rows]
    return out, state


@each_backend
def test_blocks_and_a_state(backend):
    q, k, v = (t.detach() for t in draw(backend, *[(B, S, H, D)] * 3))
    slopes = tm.lightning_slopes(H, layer=3, num_layers=LAYERS, convention="paper")
    slopes = slopes.to(device_of(backend))
    out, state = tm.lightning_attention(q, k, v, slopes, return_final_state=True, backend=backend)
    steps = torch.zeros_like(state)
    for b in range(B):
        for h in range(H):
            rows = (t[b, :, h].cpu().double() for t in (q, k, v))
            want, kv = by_blocks(*rows, (-slopes[h].cpu().double()).exp())
            close(out[b, :, h].cpu(), want, 1e-4)
            close(state[b, h].cpu(), kv, 1e-4)
    for t in range(S):  # decode step: KV <- decay KV + k v^T, o = q KV
        last = tm.linear_attention_decode(
            q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], steps, log_decay=-slopes, scale=1.0,
            backend=backend,
        )  # fmt: skip
    close(last, out[:, -1:], 1e-4)
    close(steps, state, 1e-4)


@each_backend
def test_the_sum_over_pairs(backend):
    q, k, v = leaves = draw(backend, *[(B, S, H, D)] * 3)
    slopes = tm.lightning_slopes(H, layer=0, num_layers=LAYERS, convention="paper")
    slopes = slopes.to(device_of(backend))
    place = torch.arange(S, device=q.device)
    distance = (place[:, None] - place).clamp(min=0)
    weights = torch.exp(-slopes[:, None, None] * distance).tril()
    want = torch.einsum("bihd,bjhd,hij,bjhe->bihe", q, k, weights, v)
    got = tm.lightning_attention(q, k, v, slopes, backend=backend)
    close(got, want, 1e-4)
    same_gradients(got, want, leaves, 1e-3)
