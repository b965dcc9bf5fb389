"""Inputs of landmark attention, and its weights from logits."""

from __future__ import annotations

import torch
from conftest import device_of


def inputs(backend, length, heads=4, kv_heads=2, b=2, d=8, dv=12, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, d), (kv_heads, d), (kv_heads, dv))
    tensors = (torch.randn(b, length, *s, generator=g).to(dtype) for s in shapes)
    return [t.to(device_of(backend)).requires_grad_() for t in tensors]


def weights_of(z, i, block, blocks=None):
    """Weights of query i over all keys, from its logits z [S], one key after the other; and log
    Z."""
    own = i // block
    last = own * block + block - 1
    logits = {j: z[j] for j in range(own * block, i + 1) if j != last}
    for b in range(own) if blocks is None else blocks:
        logits[b * block + block - 1] = z[b * block + block - 1]
    if not logits:
        return torch.zeros_like(z), z.new_tensor(-torch.inf)
    log_z = torch.stack([*logits.values()]).logsumexp(0)
    w = [z.new_zeros(())] * len(z)
    for j, logit in logits.items():
        share = (logit - log_z).exp()
        if j // block == own:
            w[j] = share
            continue
        first = j - block + 1
        for m, inner in enumerate(torch.softmax(z[first:j], 0)):
            w[first + m] = share * inner
    return torch.stack(w), log_z
