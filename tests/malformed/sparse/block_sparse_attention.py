"""Malformed calls of block_sparse_attention."""

from __future__ import annotations

import torch
from malformed import Call, ints, refused
from malformed.rules import block_lists, forced, option, out, qkv, rank, scale, tensor


def _packed(call: Call) -> None:
    """The first request, as packed queries on the keys of both requests."""
    call.update({name: call[name][0] for name in ("q", "indices", "counts")})


# Edits of the first sample: q [2, 70, 4, 32], k and v [2, 70, 2, 32], indices [2, 2, 5, 3].
CALLS = (
    *qkv([2, 70, 4, 32], [2, 70, 2, 32]),
    *option("block_q", "must be a power of two up to 128", 24),
    *option("block_k", "must be a power of two up to 128", 0, 256),
    *forced(),
    *option("num_recent", "requires causal", 4),
    *scale(),
    *block_lists([2, 2, 5, 3]),
    refused(
        "indices: must have shape [2, heads, 3, K] with 1, 2 or 4 heads; got [2, 2, 5, 3]",
        block_q=32,
    ),
    *tensor("seqlens_k", "[2]", [3], "int32"),
    *tensor("sink", "[4]", [2]),
    refused("cu_seqlens_q: must be given with cu_seqlens_k; got None", cu_seqlens_k=ints(0, 70)),
    rank("q", "[T, H, D] (packed)", got=4, cu_seqlens_q=ints(0, 70)),
    refused(
        "k: must have the batch size of q, 3; got 2", _packed, cu_seqlens_q=ints(0, 30, 50, 70)
    ),
    refused(
        "cu_seqlens_q: must be int32; got int64", _packed, cu_seqlens_q=torch.tensor([0, 30, 70])
    ),
    refused(
        "indices: must have shape [heads, 6, K] with 1, 2 or 4 heads; got [2, 5, 3]",
        _packed,
        cu_seqlens_q=ints(0, 30, 70),
    ),
    *out([2, 70, 4, 32], [2, 70, 2, 32]),
)
