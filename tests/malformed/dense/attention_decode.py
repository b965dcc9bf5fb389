"""Malformed calls of attention_decode."""

from __future__ import annotations

import torch
from malformed import Call, ints, refused, refused_values
from malformed.rules import decode, kinds, offsets, option, paged, per_head, rank, scale
from torch import zeros

from tokenmill import masks


def _packed(call: Call) -> None:
    """One token of each request, packed."""
    call.update(q=call["q"][:, 0], cu_seqlens_q=ints(*range(4)))


_SEGMENTS = masks.segments(*zeros(2, 3, 9, dtype=torch.int32))

# Edits of the first sample: q [3, 1, 4, 32], k_cache and v_cache [3, 64, 2, 32], lengths 37, 64, 5.
CALLS = (
    *decode([3, 1, 4, 32], [3, 64, 2, 32]),
    *kinds(),
    *scale(),
    *per_head(3, 4),
    refused(
        "mask: must not be a prefix with a cache; got 'prefix'", mask=masks.prefix(ints(0, 0, 0))
    ),
    refused(
        "mask_k_spans: must have shape [3 or 1, 64 or more, 2]; got [1, 9, 2]",
        mask=masks.segments(*(zeros(*shape, dtype=torch.int32) for shape in ((3, 1), (1, 9)))),
    ),
    refused(
        "window: right must be -1 or 0 where queries are causal: none sees a later key; got 3",
        window=(4, 3),
    ),
    rank("q", "[T, H, D] (packed)", got=4, cu_seqlens_q=ints(0, 1, 2, 3)),
    refused(
        "k_cache: must have the batch size of q, 2; got 3", _packed, cu_seqlens_q=ints(0, 1, 3)
    ),
    *option("max_seqlen_q", "requires cu_seqlens_q", 4),
    refused("max_seqlen_q: must not be negative; got -1", _packed, max_seqlen_q=-1),
    refused("mask: must be only ranges with cu_seqlens_q; got 'segments'", _packed, mask=_SEGMENTS),
    *offsets("cu_seqlens_q", _packed, [0, 1, 2, 3], [0, 2, 1, 3]),
    refused_values(
        "max_seqlen_q: must be at least the longest sequence, 2; got 1",
        _packed,
        cu_seqlens_q=ints(0, 2, 2, 3),
        max_seqlen_q=1,
    ),
    *(
        refused_values(
            f"block_table: must name pages below 12 where keys lie; got {page}",
            paged,
            block_table=ints([0, 1, page, 3], [4, 5, 6, 7], [8, 9, 10, 11]),
        )
        for page in (12, -1)
    ),
    *option("schedule", "must be 'auto', 'split' or 'stream_k'", "lean"),
    refused(
        "invariant: must be False with head dimensions above 256; got True",
        q=zeros(3, 1, 4, 264),
        k_cache=zeros(3, 64, 2, 264),
        invariant=True,
    ),
    *option("schedule", "must be 'auto' or 'split' with num_splits 2", "stream_k", num_splits=2),
)
