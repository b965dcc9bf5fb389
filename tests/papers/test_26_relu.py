"""Active-Dormant Attention Heads: relu(q_i.k_j) in place of softmax. The released code
(GuoTianYu2000/Active-Dormant-Attention at 16b3593, BBM/model.py) divides the weights of token i by
the i + 1 keys that it sees; the formula in the text does not divide."""

from __future__ import annotations

import pytest
import torch
from tensors import close, draw, every_backend, same_gradients

import tokenmill as tm

B, S, H, D = 1, 13, 2, 16


@every_backend
@pytest.mark.parametrize("normalize", ["count", None], ids=["released", "text"])
def test_relu_in_place_of_softmax(normalize, backend):
    q, k, v = leaves = draw(backend, *[(B, S, H, D)] * 3)
    rows = []
    for i in range(S):
        z = torch.einsum("bhd,bjhd->bhj", q[:, i], k[:, : i + 1]) * D**-0.5
        weights = z.clamp(min=0) / (i + 1 if normalize else 1)
        rows.append(torch.einsum("bhj,bjhd->bhd", weights, v[:, : i + 1]))
    want = torch.stack(rows, 1)
    got = tm.attention(q, k, v, kind="relu", normalize=normalize, causal=True, backend=backend)
    close(got, want)
    same_gradients(got, want, leaves)
