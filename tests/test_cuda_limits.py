"""Calls that are too large only for CUDA kernels: the error names argument, rule and value."""

from __future__ import annotations

import pytest
import torch
from conftest import backends, device_of

import tokenmill as tm

TOO_LARGE = {
    "kv_block_scores k": (
        lambda few, many, ints: ((few(1), many(2**31)), {"block_k": 2**31 - 1}),
        "must have at most 2^31 - 256 keys of a request on CUDA; got 2147483648",
    ),
    "kv_block_scores q": (
        lambda few, many, ints: (
            (many(2**31), few(1)),
            {"q_reduce": "max", "block_q": 2**31 - 1},
        ),
        "must have at most 2^31 - 256 queries for a key head on CUDA; got 4294967294",
    ),
    "hip_block_select q": (
        lambda few, many, ints: (
            (many(2**31), many(2**31 - 1)),
            {"block_q": 2**31 - 64, "stride_q": 1},
        ),
        "must have at most 2^31 - 256 queries of a block for a key head on CUDA; got 2147483584",
    ),
    "indexer_topk_select k": (
        lambda few, many, ints: (
            (few(1), many(2**31 - 1)[..., 0], few(1)[..., 0], 4),
            {"block_k": 2**31 - 1},
        ),
        "must have at most 2^31 - 256 keys of a request on CUDA; got 2147483647",
    ),
    "attention k": (
        lambda few, many, ints: ((few(1), many(2**29 + 1), many(2**29 + 1)), {}),
        "must have at most 2^29 tokens on CUDA; got 536870913",
    ),
    "attention_decode k_cache": (
        lambda few, many, ints: (
            (few(1), many(2**29 + 1), many(2**29 + 1)),
            {"seqlens_k": ints(1)},
        ),
        "must have room for at most 2^29 keys of a request on CUDA; got 536870913",
    ),
    "sparse_decode_attention k_cache": (
        lambda few, many, ints: (
            (few(1), many(2**29 + 1), many(2**29 + 1), ints(1, 1, 1), ints(1, 1)),
            {"seqlens_k": ints(1)},
        ),
        "must have room for at most 2^29 keys of a request on CUDA; got 536870913",
    ),
    "block_sparse_attention k": (
        lambda few, many, ints: (
            (few(1), many(2**29 + 1), many(2**29 + 1), ints(1, 1, 1, 1), ints(1, 1, 1)),
            {"block_q": 64, "block_k": 64},
        ),
        "must have at most 2^29 tokens on CUDA; got 536870913",
    ),
}


@pytest.mark.parametrize("backend", [b for b in backends() if b in ("cuda", "emulated")])
@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_too_large_for_cuda_is_named(name, backend):
    device = device_of(backend)
    make, rule = TOO_LARGE[name]
    args, kwargs = make(
        lambda tokens: torch.zeros(1, tokens, 1, 1, device=device),
        lambda tokens: torch.zeros(1, device=device).expand(1, tokens, 1, 1),
        lambda *shape: torch.zeros(shape, dtype=torch.int32, device=device),
    )
    op, argument = name.split()
    with pytest.raises(RuntimeError) as found:
        getattr(tm, op)(*args, **kwargs, backend=backend)
    assert str(found.value) == f"tokenmill.{op}: {argument}: {rule}"
