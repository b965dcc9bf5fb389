"""Shared code of the titans_memory tests: inputs, and the recurrence token by token."""

from __future__ import annotations

import torch

GATES = ("alpha", "eta", "theta")


def recurrence(q, k, v, alpha, eta, theta, memory=None, momentum=None, *, chunk):
    """Returns out, memory and momentum."""
    if memory is None:
        memory = momentum = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outs = [v[:, :0]]
    for t in range(q.shape[1]):
        if t % chunk == 0:
            start = memory
        error = torch.einsum("bhd,bhde->bhe", k[:, t], start) - v[:, t]
        gradient = torch.einsum("bhd,bhe->bhde", k[:, t], error)
        forget, keep, step = (gate[:, t, :, None, None] for gate in (alpha, eta, theta))
        momentum = keep * momentum - step * gradient
        memory = (1 - forget) * memory + momentum
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, t], memory)[:, None])
    return torch.cat(outs, 1), memory, momentum


def draw(*lead, heads=2, d=3, dv=4, states=2, dtype=torch.float64, seed=0):
    """q, k, v, alpha, eta, theta, memory, momentum, each requiring a gradient."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*lead, heads, n, generator=g) / n**0.5 for n in (d, d, dv)]
    tensors += [torch.rand(*lead, heads, generator=g) for _ in GATES]
    tensors += [torch.randn(states, heads, d, dv, generator=g) for _ in range(2)]
    return [t.to(dtype).requires_grad_() for t in tensors]
