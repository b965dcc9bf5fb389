"""Malformed calls of hip_block_select."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Call, ints, refused
from malformed.rules import (
    PAGED,
    forced,
    keys,
    layout,
    lengths,
    option,
    packed_lists,
    queries,
    rank,
    table_of_queries,
)
from torch import zeros


def _packed(call: Call) -> None:
    """Two packed requests of 20 queries and 160 keys."""
    call.update({name: call[name].flatten(0, 1) for name in "qk"})
    call.update(cu_seqlens_q=ints(0, 20, 40), cu_seqlens_k=ints(0, 160, 320))


def _start(*shape: int, dtype: torch.dtype = torch.int32) -> Any:
    return zeros(shape, dtype=dtype), zeros(shape[:-1], dtype=torch.int32)


_START = _start(2, 2, 1, 16)

# Edits of the first sample: q [2, 20, 2, 16], k [2, 160, 1, 16], budget 32 of blocks of 2.
CALLS = (
    *queries([2, 20, 2, 16]),
    rank("k", PAGED),
    layout("k"),
    *keys([2, 20, 2, 16], [2, 160, 1, 16]),
    *table_of_queries(2),
    rank("q", "[T, H, D] (packed)", got=4, cu_seqlens_q=ints(0, 20, 40)),
    *packed_lists(_packed, [0, 20, 40], [0, 160, 320], [0, 50, 40]),
    refused(
        "cu_seqlens_q: must be given with cu_seqlens_k; got None",
        k=lambda k: k.flatten(0, 1),
        cu_seqlens_k=ints(0, 160, 320),
    ),
    refused("seqlens_q: must be None with cu_seqlens_q; got [2]", _packed, seqlens_q=ints(20, 20)),
    *lengths("seqlens_q", 2, 20, 1),
    *lengths("seqlens_k", 2, 160),
    *option("block_k", "must be 1 to 128", 0),
    *option("block_q", "must be 1 to 2^31 - 1", 0),
    *option("stride_q", "must be 1 to 2^31 - 1", -1),
    *option("restart_span", "must be 1 to 2^31 - 1", 0),
    *option("budget", "must be a multiple of block_k, from 1 to 2048 times", 33, 4098),
    *option("representative", "must be 'first', 'middle' or 'last'", "random"),
    *forced(),
    *option("bound", "must be 'sample' or 'minmax'", "max"),
    *option("head_reduce", "must be 'none' or 'group_max'", "group_mean"),
    refused(
        "start_indices: must have the shape of the result, [2, 2, 1, 16]; got [2, 2, 1, 15]",
        start=_start(2, 2, 1, 15),
    ),
    refused(
        "start_counts: must have the shape of the result, [2, 2, 1]; got [2, 2, 1, 16]",
        start=(_START[0], _START[0]),
    ),
    refused(
        "start_indices: must be int32; got int64", start=_start(2, 2, 1, 16, dtype=torch.int64)
    ),
    refused(
        "start_indices: must be None with bound 'minmax'; got a tensor of shape [2, 2, 1, 16]",
        start=_START,
        bound="minmax",
    ),
    refused("start: must be (indices, counts) or None", start=(_START[0], None)),
)
