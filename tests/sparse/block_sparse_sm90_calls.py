"""Calls of block_sparse_attention for its sm_90a kernels, on the PTX machine."""

from __future__ import annotations

import torch

from tokenmill.sparse.block_sparse_attention_cases import block_sparse_call

F16, BF16 = torch.float16, torch.bfloat16


def drawn(dtype=F16, seed=0, **options):
    """A call with one request and head, head_dim 64, blocks of 64 queries and keys, unless options
    differ."""
    defaults = {"b": 1, "h": 1, "hk": 1, "lists": 1, "d": 64, "block_q": 64, "block_k": 64}
    options = defaults | options
    options.setdefault("dv", options["d"])
    return block_sparse_call(**options)(dtype, torch.Generator().manual_seed(seed))


PACKED = {"sq": 150, "sk": 150, "b": 4, "entries": 2, "ends_q": (70, 70, 134, 290)}
PACKED_KEYS = PACKED | {"ends_k": (60, 60, 300, 340)}
