"""A Unified View of Long-Sequence Models: multi-head attention over shards of the sequence."""

from __future__ import annotations

import torch
from tensors import close, draw, each_backend, same_gradients

import tokenmill as tm

B, S, H, D, SHARDS = 2, 40, 4, 16, 4


@each_backend
def test_shards_together_are_multi_head_attention(backend):
    x, *weights = leaves = draw(backend, (B, S, H * D), *[(H * D, H * D)] * 4)
    q, k, v = ((x @ w / (H * D) ** 0.5).unflatten(2, (H, D)) for w in weights[:3])
    heads = []
    for h in range(H):
        z = q[:, :, h] @ k[:, :, h].mT * D**-0.5
        heads.append(z.softmax(-1) @ v[:, :, h])
    want = torch.cat(heads, -1) @ weights[3]
    parts = [
        tm.attention(q, keys, values, return_lse=True, backend=backend)
        for keys, values in zip(k.chunk(SHARDS, 1), v.chunk(SHARDS, 1), strict=True)
    ]
    outs, lses = (torch.stack(t) for t in zip(*parts, strict=True))
    out, _ = tm.merge_attention_states(outs, lses, backend=backend)
    got = out.flatten(2) @ weights[3]
    close(got, want, 1e-4)
    same_gradients(got, want, leaves, 1e-3)
