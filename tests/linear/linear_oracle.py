"""Shared code of the linear attention tests: inputs, and float64 results over sequences that are
too long for the token-by-token reference."""

from __future__ import annotations

import torch
from conftest import device_of
from each import randn

from tokenmill import registry
from tokenmill.reference.linear import linear_attention as reference

SIZE = 128


def chunked(q, k, v, *, log_decay=None, initial_state=None, **options):
    """out and final state in float64, from the quadratic form over pieces of SIZE tokens."""
    q, k, v = (t.double() for t in (q, k, v))
    log_decay = None if log_decay is None else log_decay.double()
    state = None if initial_state is None else initial_state.double()
    outs = []
    for start in range(0, max(q.shape[1], 1), SIZE):
        rows = slice(start, start + SIZE)
        gated = log_decay is not None and log_decay.dim() > 1
        decay = log_decay[:, rows] if gated else log_decay
        record = registry.get("linear_attention").record(
            q[:, rows], k[:, rows], v[:, rows],
            log_decay=decay, initial_state=state, return_final_state=True, **options,
        )  # fmt: skip
        out, state, _ = reference.linear_attention_quadratic(record)
        outs.append(out)
    return torch.cat(outs, 1), state


def relative_error(a, b) -> float:
    """||a - b|| / ||b||."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape
    if b.numel() == 0:
        return 0.0
    norm = b.norm().item()
    return (a - b).norm().item() / norm if norm > 0 else a.norm().item()


def close(a, b, tolerance=2e-5):
    assert relative_error(a, b) < tolerance


def inputs(backend, length, heads=2, d=16, dv=16, batch=1, dtype=torch.float32, kv_heads=None):
    kv_heads = kv_heads or heads
    shapes = (heads, d), (kv_heads, d), (kv_heads, dv)
    return [randn(batch, length, *shape, dtype=dtype, backend=backend) for shape in shapes]


def interpreted(backend) -> bool:
    """True if the backend is too slow for long sequences."""
    return device_of(backend) == "cpu" and backend not in ("cpu", "reference")
