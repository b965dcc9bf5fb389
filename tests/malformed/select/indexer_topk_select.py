"""Malformed calls of indexer_topk_select."""

from __future__ import annotations

from malformed import Call, ints, refused
from malformed.rules import (
    OR_FLOAT8,
    cache_scales,
    float8,
    forced,
    layout,
    lengths,
    option,
    packed_lists,
    previous,
    queries,
    rank,
    same_batch,
    same_dtype,
    table_of_queries,
)
from torch import zeros


def _packed(call: Call) -> None:
    """Two sequences, packed: the first, cut."""
    call.update({name: call[name][0] for name in ("q", "k", "weights")})
    call.update(seqlens_k=None, cu_seqlens_q=ints(0, 4, 9), cu_seqlens_k=ints(0, 20, 50))


# Edits of the first sample: q [2, 9, 4, 16], k [2, 50, 16], weights [2, 9, 4].
CALLS = (
    *option("activation", "must be 'relu' or 'none'", "gelu"),
    *queries([2, 9, 4, 16]),
    rank("q", "[T, H, D] (packed)", got=4, cu_seqlens_q=ints(0, 9)),
    rank("k", "[B, S, D] or [pages, page_size, D]", got=4),
    rank("k", "[T, D] (packed)", got=3, cu_seqlens_k=ints(0, 9)),
    same_dtype("k", "q", also=OR_FLOAT8),
    layout("k"),
    same_batch("k", "q", 2),
    refused("k: must have the head dimension of q, 16; got 15", k=lambda k: k[..., 1:]),
    refused("weights: must have shape [2, 9, 4]; got [2, 9, 3]", weights=lambda w: w[..., 1:]),
    refused(
        "weights: must be float32 or have the dtype of q, float32; got bfloat16",
        weights=lambda w: w.bfloat16(),
    ),
    layout("weights"),
    refused("q: must have 1 to 64 heads; got 65", q=zeros(2, 9, 65, 16), weights=zeros(2, 9, 65)),
    refused(
        "cu_seqlens_q: must be given with cu_seqlens_k; got None",
        k=lambda k: k[0],
        cu_seqlens_k=ints(0, 50),
    ),
    *packed_lists(_packed, [0, 4, 9], [0, 20, 50], [0, 12, 9]),
    *table_of_queries(2),
    *option("topk", "must be 1 to 65536", 0, 65537),
    *option("block_k", "must be 1 to 2^31 - 1", 0),
    *forced(),
    *lengths("seqlens_k", 2, 50),
    *cache_scales("k_scale", [2, 50], float8("k"), "[1] or {1}"),
    *previous([2, 9], "[B, Sq, K]", "list for each query, [2, 9]"),
    rank("previous", "[T, K] (packed)", _packed, got=3, previous=ints(1)[None, None]),
)
