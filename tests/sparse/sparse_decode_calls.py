"""Calls of sparse_decode_attention for its tests."""

from __future__ import annotations

import torch
from conftest import device_of
from each import ints

import tokenmill as tm
from tokenmill.sparse.sparse_decode_attention_cases import sparse_call

INF, NAN = float("inf"), float("nan")
MIN, MAX = -(2**31), 2**31 - 1


def moved(value, device):
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def drawn(backend, lengths=(37, 64, 5), dtype=torch.float32, seed=0, **options):
    """A call of sparse_call on the backend's device."""
    args, kwargs = sparse_call(lengths, **options)(dtype, torch.Generator().manual_seed(seed))
    device = device_of(backend)
    return [a.to(device) for a in args], {k: moved(v, device) for k, v in kwargs.items()}


def run(backend, args, kwargs, **changes):
    return tm.sparse_decode_attention(*args, **{**kwargs, **changes}, backend=backend)


def close(got, want, atol=1e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def every_block(batch, heads, capacity, block_k, backend):
    """Lists of all blocks that a request may have."""
    blocks = -(-capacity // block_k)
    ids = torch.arange(blocks, dtype=torch.int32).expand(batch, heads, blocks).contiguous()
    counts = torch.full((batch, heads), blocks, dtype=torch.int32)
    return ids.to(device_of(backend)), counts.to(device_of(backend))


def lists_of(rows, backend):
    """One list per request, for all heads."""
    longest = max(map(len, rows))
    padded = [[[*row, *[-1] * (longest - len(row))]] for row in rows]
    return ints(*padded, backend=backend), ints(*([len(row)] for row in rows), backend=backend)


def inside(value, fill):
    """The same values as a slice of a wider tensor."""
    if isinstance(value, tuple):
        return tuple(inside(v, fill) for v in value)
    wide = value.new_full((*value.shape[:-1], value.shape[-1] + 3), fill)
    wide[..., 1:-2] = value
    return wide[..., 1:-2]
