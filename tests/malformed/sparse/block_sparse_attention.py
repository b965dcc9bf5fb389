"""Malformed calls of block_sparse_attention."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options
from torch import Tensor


def packed(ends: Tensor) -> Any:
    """The first request of the first sample, as packed queries on the keys of both requests."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[0], args[3], args[4] = (args[i][0] for i in (0, 3, 4))
        kwargs["cu_seqlens_q"] = ends

    return edit


# Edits of the first sample: q [2, 70, 4, 32], k and v [2, 70, 2, 32], indices [2, 2, 5, 3].
CALLS = (
    Malformed(
        "rank", "q: must have 4 dimensions [B, S, H, D]; got 3", set_argument(0, lambda q: q[0])
    ),
    Malformed(
        "dtypes", "k: must have the dtype of q, float32; got float16", set_argument(1, Tensor.half)
    ),
    Malformed(
        "queries", "block_q: must be a power of two up to 128; got 24", set_options(block_q=24)
    ),
    Malformed("keys", "block_k: must be a power of two up to 128; got 0", set_options(block_k=0)),
    Malformed(
        "wide block", "block_k: must be a power of two up to 128; got 256", set_options(block_k=256)
    ),
    Malformed("first keys", "num_sink: must not be negative; got -1", set_options(num_sink=-1)),
    Malformed("last keys", "num_recent: must not be negative; got -2", set_options(num_recent=-2)),
    Malformed(
        "last keys without order",
        "num_recent: requires causal; got 4",
        set_options(num_recent=4),
    ),
    Malformed(
        "scale", "scale: must be at most 2^127 in size; got inf", set_options(scale=float("inf"))
    ),
    Malformed(
        "rank of lists",
        "indices: must have shape [2, heads, 5, K] with 1, 2 or 4 heads; got [2, 5, 3]",
        set_argument(3, lambda t: t[:, 0]),
    ),
    Malformed(
        "heads of lists",
        "indices: must have shape [2, heads, 5, K] with 1, 2 or 4 heads; got [2, 3, 5, 3]",
        set_argument(3, lambda t: t[:, :1].repeat(1, 3, 1, 1)),
    ),
    Malformed(
        "rows of lists",
        "indices: must have shape [2, heads, 3, K] with 1, 2 or 4 heads; got [2, 2, 5, 3]",
        set_options(block_q=32),
    ),
    Malformed(
        "shape of counts",
        "counts: must have shape [2, 2, 5]; got [2, 1, 5]",
        set_argument(4, lambda t: t[:, :1]),
    ),
    Malformed("dtype of lists", "indices: must be int32; got int64", set_argument(3, Tensor.long)),
    Malformed(
        "layout of lists",
        "indices: must have a contiguous last dimension",
        set_argument(3, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    ),
    Malformed(
        "shape of seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        set_options(seqlens_k=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "dtype of seqlens_k",
        "seqlens_k: must be int32; got int64",
        set_options(seqlens_k=torch.zeros(2, dtype=torch.int64)),
    ),
    Malformed(
        "shape of sink", "sink: must have shape [4]; got [2]", set_options(sink=torch.zeros(2))
    ),
    Malformed(
        "packed keys alone",
        "cu_seqlens_q: must be given with cu_seqlens_k; got None",
        set_options(cu_seqlens_k=ints(0, 70)),
    ),
    Malformed(
        "rank of packed queries",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens_q=ints(0, 70)),
    ),
    Malformed(
        "requests of packed queries",
        "k: must have the batch size of q, 3; got 2",
        packed(ints(0, 30, 50, 70)),
    ),
    Malformed(
        "dtype of cu_seqlens_q",
        "cu_seqlens_q: must be int32; got int64",
        packed(torch.tensor([0, 30, 70])),
    ),
    Malformed(
        "rows of packed lists",
        "indices: must have shape [heads, 6, K] with 1, 2 or 4 heads; got [2, 5, 3]",
        packed(ints(0, 30, 70)),
    ),
    Malformed(
        "out shape",
        "out: must have shape [2, 70, 4, 32]; got [2, 70, 2, 32]",
        set_options(out=torch.zeros(2, 70, 2, 32)),
    ),
    Malformed(
        "out over q",
        "out: must not share memory with q; strides; got [8960, 128, 32, 1]",
        lambda a, k: k.update(out=a[0]),
    ),
)
