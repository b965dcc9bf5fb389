"""Active-Dormant Attention Heads: o_i = sum_j relu(q_i.k_j) v_j, without a normaliser."""

from __future__ import annotations

import torch
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

B, S, H, D = 2, 27, 3, 16


@each_backend
def test_relu_in_place_of_softmax(backend):
    q, k, v = leaves = draw(backend, *[(B, S, H, D)] * 3)
    rows = []
    for i in range(S):
        z = torch.einsum("bhd,bjhd->bhj", q[:, i], k[:, : i + 1]) * D**-0.5
        rows.append(torch.einsum("bhj,bjhd->bhd", z.clamp(min=0), v[:, : i + 1]))
    want = torch.stack(rows, 1)
    got = tm.attention(q, k, v, kind="relu", causal=True, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)
