"""Malformed calls of hip_block_select."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options


def _half_a_start(args: list[Any], kwargs: dict[str, Any]) -> None:
    kwargs["start"] = (torch.zeros(2, 2, 1, 16, dtype=torch.int32), None)


def _packed(**options: Any) -> Any:
    """The first sample packed, with changed options."""
    ends = {"cu_seqlens_q": ints(0, 20, 40), "cu_seqlens_k": ints(0, 160, 320)}

    def change(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[:2] = (t.flatten(0, 1) for t in args[:2])
        if options.get("cu_seqlens_q", 0) is None:
            args[0] = args[0].unflatten(0, (2, 20))
        kwargs.update(ends | options)

    return change


def _start(shape: tuple[int, ...] = (2, 2, 1, 16), dtype: torch.dtype = torch.int32) -> Any:
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape[:-1], dtype=torch.int32)


# Edits of the first sample: q [2, 20, 2, 16], k [2, 160, 1, 16], budget 32 of blocks of 2.
CALLS = (
    Malformed(
        "rank of q",
        "q: must have 4 dimensions [B, S, H, D]; got 3",
        set_argument(0, lambda q: q[0]),
    ),
    Malformed(
        "rank of k",
        "k: must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]; got 3",
        set_argument(1, lambda k: k[0]),
    ),
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda q: q.int()),
    ),
    Malformed(
        "dtype of k",
        "k: must have the dtype of q, float32; got float16",
        set_argument(1, lambda k: k.half()),
    ),
    Malformed(
        "layout",
        "k: must have a contiguous last dimension",
        set_argument(1, lambda k: k.transpose(1, 3)),
    ),
    Malformed(
        "wide head",
        "q: must have a head dimension of 1 to 256; got 257",
        set_argument(0, lambda q: torch.zeros(2, 3, 4, 257)),
    ),
    Malformed(
        "head dimension",
        "k: must have the head dimension of q, 16; got 15",
        set_argument(1, lambda k: k[..., 1:]),
    ),
    Malformed(
        "heads",
        "k: number of heads must divide that of q, 2 (GQA); got 3",
        set_argument(1, lambda k: torch.zeros(2, 5, 3, 16)),
    ),
    Malformed(
        "batch", "k: must have the batch size of q, 2; got 1", set_argument(1, lambda k: k[:1])
    ),
    Malformed(
        "batch of the table",
        "block_table: must have the batch size of q, 2; got 3",
        set_options(block_table=torch.zeros(3, 1, dtype=torch.int32)),
    ),
    Malformed(
        "rank of packed queries",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens_q=ints(0, 20, 40)),
    ),
    Malformed(
        "packed keys alone",
        "cu_seqlens_q: must be given with cu_seqlens_k; got None",
        _packed(cu_seqlens_q=None),
    ),
    Malformed(
        "lengths of packed queries",
        "seqlens_q: must be None with cu_seqlens_q; got [2]",
        _packed(seqlens_q=ints(20, 20)),
    ),
    Malformed(
        "lengths of packed keys",
        "seqlens_k: must be None with cu_seqlens_k; got [2]",
        _packed(seqlens_k=ints(160, 160)),
    ),
    Malformed(
        "dtype of cu_seqlens_q",
        "cu_seqlens_q: must be int32; got int64",
        _packed(cu_seqlens_q=torch.tensor([0, 20, 40])),
    ),
    Malformed(
        "sequences",
        "cu_seqlens_k: must have the length of cu_seqlens_q, 3; got 2",
        _packed(cu_seqlens_k=ints(0, 320)),
    ),
    Malformed(
        "packed ends",
        "cu_seqlens_q: must end at the number of tokens, 40; got 39",
        _packed(cu_seqlens_q=ints(0, 20, 39)),
        values=True,
    ),
    Malformed(
        "seqlens_q",
        "seqlens_q: must have shape [2]; got [1]",
        set_options(seqlens_q=ints(20)),
    ),
    Malformed(
        "queries",
        "seqlens_q: must be 0 to 20; got 21",
        set_options(seqlens_q=ints(20, 21)),
        values=True,
    ),
    Malformed("block_k", "block_k: must be 1 to 128; got 0", set_options(block_k=0)),
    Malformed("block_q", "block_q: must be 1 to 2^31 - 1; got 0", set_options(block_q=0)),
    Malformed("stride_q", "stride_q: must be 1 to 2^31 - 1; got -1", set_options(stride_q=-1)),
    Malformed(
        "restart_span",
        "restart_span: must be 1 to 2^31 - 1; got 0",
        set_options(restart_span=0),
    ),
    Malformed(
        "budget",
        "budget: must be a multiple of block_k, from 1 to 2048 times; got 33",
        set_options(budget=33),
    ),
    Malformed(
        "large budget",
        "budget: must be a multiple of block_k, from 1 to 2048 times; got 4098",
        set_options(budget=4098),
    ),
    Malformed(
        "representative",
        "representative: must be 'first', 'middle' or 'last'; got 'random'",
        set_options(representative="random"),
    ),
    Malformed("num_sink", "num_sink: must not be negative; got -1", set_options(num_sink=-1)),
    Malformed("num_recent", "num_recent: must not be negative; got -2", set_options(num_recent=-2)),
    Malformed("bound", "bound: must be 'sample' or 'minmax'; got 'max'", set_options(bound="max")),
    Malformed(
        "head_reduce",
        "head_reduce: must be 'none' or 'group_max'; got 'group_mean'",
        set_options(head_reduce="group_mean"),
    ),
    Malformed(
        "seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        set_options(seqlens_k=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "shape of start",
        "start_indices: must have the shape of the result, [2, 2, 1, 16]; got [2, 2, 1, 15]",
        set_options(start=_start((2, 2, 1, 15))),
    ),
    Malformed(
        "shape of its counts",
        "start_counts: must have the shape of the result, [2, 2, 1]; got [2, 2, 1, 16]",
        set_options(start=(_start()[0], _start()[0])),
    ),
    Malformed(
        "dtype of start",
        "start_indices: must be int32; got int64",
        set_options(start=_start(dtype=torch.int64)),
    ),
    Malformed(
        "start of an exact search",
        "start_indices: must be None with bound 'minmax'; got a tensor of shape [2, 2, 1, 16]",
        set_options(start=_start(), bound="minmax"),
    ),
    Malformed("half a start", "start: must be (indices, counts) or None", _half_a_start),
    Malformed(
        "length",
        "seqlens_k: must be 0 to 160; got 161",
        set_options(seqlens_k=ints(160, 161)),
        values=True,
    ),
    Malformed(
        "missing page",
        "block_table: must hold pages below 2 up to the length; got 7",
        set_options(block_table=ints([0], [7])),
        values=True,
    ),
)
