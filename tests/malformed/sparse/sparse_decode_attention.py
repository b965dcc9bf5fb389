"""Malformed calls of sparse_decode_attention."""

from __future__ import annotations

from malformed import refused
from malformed.rules import block_lists, decode, forced, option, scale, tensor
from torch import zeros

from tokenmill.sparse.sparse_decode_attention_cases import rotations

_TABLE = "rope: must have shape [positions, pairs], 64 positions or more, 1 to 16 pairs; got"
_EXTRA = zeros(3, 2, 2, 32)

# Edits of the first sample: q [3, 1, 4, 32], k_cache and v_cache [3, 64, 2, 32], lengths 37, 64, 5,
# indices [3, 2, 12].
CALLS = (
    *decode([3, 1, 4, 32], [3, 64, 2, 32]),
    *scale(),
    *option("block_k", "must be a power of two up to 128", 12, 256),
    *forced(),
    *option("pos_mode", "must be 'absolute' or 'cache'", "rank"),
    refused(
        "pos_mode: 'cache' requires one query token; q has; got 2",
        q=lambda q: q.expand(-1, 2, -1, -1),
        pos_mode="cache",
    ),
    *block_lists([3, 2, 12]),
    refused(f"{_TABLE} [63, 16]", rope=rotations(63, 16)),
    refused(f"{_TABLE} [64, 17]", rope=rotations(64, 17)),
    refused(
        "rope: must have cos and sin of one shape; got [64, 8]",
        rope=(rotations(64, 16)[0], rotations(64, 8)[1]),
    ),
    refused("extra_v: must be given with extra_k, and only then; got False", extra_k=_EXTRA),
    refused(
        "extra_log_count: needs extra_k and extra_v; got [3, 2, 2]", extra_log_count=zeros(3, 2, 2)
    ),
    refused(
        "extra_k: must have shape [3, 2, 2, 32]; got [3, 2, 1, 32]",
        extra_k=_EXTRA[:, :, :1],
        extra_v=_EXTRA,
    ),
    refused(
        "extra_v: must have the dtype of q, float32; got float16",
        extra_k=_EXTRA,
        extra_v=_EXTRA.half(),
    ),
    refused(
        "extra_log_count: must have shape [3, 2, 2]; got [3, 2]",
        extra_k=_EXTRA,
        extra_v=_EXTRA,
        extra_log_count=zeros(3, 2),
    ),
    *tensor("sink", "[4]", [1]),
)
