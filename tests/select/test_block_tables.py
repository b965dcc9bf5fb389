"""block_table entries beyond the length of a request are never read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import backends, device_of
from each import each_backend, ints

import tokenmill as tm

LENGTHS = (5, 0, 9)
PAGE, HEADS, DIM, PAGES = 4, 2, 16, 5


def tables(behind):
    """block_table of each request, with `behind` in entries without keys."""
    return ints((1, 3, behind, behind), (behind,) * 4, (0, 4, 2, behind))


def topk_positions(k, v, table, lengths, backend):
    scores = torch.arange(48.0, device=k.device).reshape(3, 16).cos()
    return tm.topk_select(
        scores, 6, lengths=lengths, block_table=table, page_size=PAGE, backend=backend
    )


def compacted(k, v, table, lengths, backend):
    keep = ints((0, 3, 4), (-1, -1, -1), (1, 2, 8)).to(k.device)
    counts = ints(3, 0, 3).to(k.device)
    k, v = k.clone(), v.clone()
    new = tm.kv_cache_compact(
        k, v, keep, counts, seqlens_k=lengths, block_table=table, compensation=True, backend=backend
    )
    return *new, k, v


def pooled_later(k, v, table, lengths, backend):
    pooled = k.new_zeros(3, 2 * PAGE, HEADS, DIM)
    start = (lengths - 2).clamp(min=0)
    tm.block_pool_keys_update(
        k, pooled, block=2, start=start, lengths=lengths, block_table=table, backend=backend
    )
    return pooled


def queries(k):
    return torch.linspace(-1, 1, 3 * 4 * DIM, device=k.device).reshape(3, 1, 4, DIM).sin()


CALLS = {
    "attention_decode": lambda k, v, table, lengths, backend: tm.attention_decode(
        queries(k), k, v, seqlens_k=lengths, block_table=table, backend=backend
    ),
    "sparse_decode_attention": lambda k, v, table, lengths, backend: tm.sparse_decode_attention(
        queries(k), k, v, ints(*[[(0, 2, 3, 30)]] * 3).to(k.device),
        ints((4,), (4,), (4,)).to(k.device), seqlens_k=lengths, block_table=table, num_sink=1,
        num_recent=2, backend=backend,
    ),
    "landmark_decode": lambda k, v, table, lengths, backend: tm.landmark_decode(
        queries(k), k, v, seqlens_k=lengths, block_table=table, block=3, topk=1, backend=backend
    ),
    "kv_block_scores": lambda k, v, table, lengths, backend: tm.kv_block_scores(
        queries(k), k, scoring="max_block", block_k=3, seqlens_k=lengths, block_table=table,
        backend=backend,
    ),
    "kv_block_scores, few rows": lambda k, v, table, lengths, backend: tm.kv_block_scores(
        queries(k), k, seqlens_k=lengths, block_table=table, head_reduce="softmax_vote",
        backend=backend,
    ),
    "token_select": lambda k, v, table, lengths, backend: tm.token_select(
        queries(k), k, k=3, seqlens_k=lengths, block_table=table, num_sink=1, num_recent=1,
        backend=backend,
    ),
    "hip_block_select": lambda k, v, table, lengths, backend: tm.hip_block_select(
        queries(k), k, budget=2, block_k=1, block_q=1, num_sink=1, num_recent=1,
        seqlens_k=lengths, block_table=table, backend=backend,
    ),
    "block_pool_keys": lambda k, v, table, lengths, backend: tm.block_pool_keys(
        k, block=2, mode="max", lengths=lengths, block_table=table, backend=backend
    ),
    "block_pool_keys_update": pooled_later,
    "kv_cache_compact": compacted,
    "indexer_topk_select": lambda k, v, table, lengths, backend: tm.indexer_topk_select(
        queries(k), k[:, :, 0], queries(k).sum(-1), 3, seqlens_k=lengths, block_table=table,
        return_values=True, backend=backend,
    ),
    "topk_select": topk_positions,
}  # fmt: skip


def run(name, k, v, behind, backend):
    lengths = ints(*LENGTHS).to(k.device)
    found = CALLS[name](k, v, tables(behind).to(k.device), lengths, backend)
    return found if isinstance(found, tuple) else (found,)


def caches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(PAGES, PAGE, HEADS, DIM, generator=generator) for _ in range(2)]


@each_backend
@pytest.mark.parametrize("name", CALLS)
def test_pages_behind_the_length_may_be_anything(name, backend):
    k, v = (t.to(device_of(backend)) for t in caches())
    clean = run(name, k, v, 0, backend)
    for behind in (-1, PAGES, -(2**31), 2**31 - 1):
        found = run(name, k, v, behind, backend)
        for a, b in zip(found, clean, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


GUARDED = """
import ctypes, mmap, sys, torch
sys.path[:0] = sys.argv[1:]
import test_block_tables as tables
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
size = mmap.PAGESIZE
def guarded(t):  # pages of memory that nobody may touch lie on both sides
    bytes = t.numel() * t.element_size()
    assert bytes % size == 0
    base = libc.mmap(None, bytes + 2 * size, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(base, size, 0) == libc.mprotect(base + size + bytes, size, 0) == 0
    memory = (ctypes.c_char * bytes).from_address(base + size)
    return torch.frombuffer(memory, dtype=t.dtype).view(t.shape).copy_(t)
tables.PAGE, tables.DIM = 16, 32
tables.LENGTHS = 17, 0, 33
k, v = tables.caches()
k, v = (guarded(torch.cat([t] * 2)[:8]) for t in (k, v))
for name in tables.CALLS:
    if name != "kv_cache_compact" and name != "topk_select":
        print(name, flush=True)
        tables.run(name, k, v, -1, "cpu")
        tables.run(name, k, v, 2**31 - 1, "cpu")
"""


@pytest.mark.skipif("cpu" not in backends(), reason="memory of the CPU")
def test_no_address_comes_from_behind_the_length():
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(here), str(here.parent)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"in {done.stdout.split(chr(10))[-2]}: {done.stderr}"
