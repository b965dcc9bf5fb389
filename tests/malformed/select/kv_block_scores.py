"""Malformed calls of kv_block_scores."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options


def _three_rows(args: list[Any], kwargs: dict[str, Any]) -> None:
    kwargs["scoring"] = "minmax"
    args[1] = torch.zeros(2, 5, 2, 3, 32)


def _float8_boxes(args: list[Any], kwargs: dict[str, Any]) -> None:
    _three_rows(args, kwargs)
    args[1] = args[1].to(torch.float8_e4m3fn)


def _scaled(scale: torch.Tensor) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[1] = args[1].to(torch.float8_e4m3fn)
        kwargs.update(k_scale=scale)

    return edit


# Edits of the first sample: q [2, 3, 4, 32], k [2, 50, 2, 32].
CALLS = (
    Malformed(
        "scoring",
        "scoring: must be 'dot', 'minmax' or 'max_block'; got 'sum'",
        set_options(scoring="sum"),
    ),
    Malformed(
        "rank of q",
        "q: must have 4 dimensions [B, S, H, D]; got 3",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed(
        "rank of k",
        "k: must have 4 dimensions [B, N, H, D] or [pages, page_size, H, D]; got 3",
        set_argument(1, lambda t: t[0]),
    ),
    Malformed(
        "rank of boxes",
        "k: must have 5 dimensions [B, N, H, 2, D] or [pages, page_size, H, 2, D]; got 4",
        set_options(scoring="minmax"),
    ),
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda t: t.int()),
    ),
    Malformed(
        "dtype of k",
        "k: must have the dtype of q, float32, or float8_e4m3fn; got float16",
        set_argument(1, lambda t: t.half()),
    ),
    Malformed(
        "boxes in float8",
        "k: must have the dtype of q, float32; got float8_e4m3fn",
        _float8_boxes,
    ),
    Malformed(
        "scale of float32",
        "k_scale: requires a cache in float8_e4m3fn; got float32",
        set_options(k_scale=torch.ones(1)),
    ),
    Malformed(
        "shape of the scale",
        "k_scale: must have shape [1], [2] or [2, 50, 2]; got [50]",
        _scaled(torch.ones(50)),
    ),
    Malformed(
        "layout",
        "k: must have a contiguous last dimension",
        set_argument(1, lambda t: t.transpose(1, 3)),
    ),
    Malformed(
        "head dimension",
        "k: must have the head dimension of q, 32; got 31",
        set_argument(1, lambda t: t[..., 1:]),
    ),
    Malformed(
        "wide head",
        "q: must have a head dimension of 1 to 256; got 257",
        set_argument(0, lambda _: torch.zeros(2, 3, 4, 257)),
    ),
    Malformed(
        "halves",
        "k: must have 2 rows for each block, minimum and maximum; got 3",
        _three_rows,
    ),
    Malformed(
        "heads",
        "k: number of heads must divide that of q, 4 (GQA); got 3",
        set_argument(1, lambda _: torch.zeros(2, 5, 3, 32)),
    ),
    Malformed(
        "batch",
        "k: must have the batch size of q, 2; got 1",
        set_argument(1, lambda t: t[:1]),
    ),
    Malformed(
        "batch of the table",
        "block_table: must have the batch size of q, 2; got 3",
        set_options(block_table=torch.zeros(3, 1, dtype=torch.int32)),
    ),
    Malformed("block_k", "block_k: must be 1 to 2^31 - 1; got 0", set_options(block_k=0)),
    Malformed("block_q", "block_q: must be 1 to 2^31 - 1; got -1", set_options(block_q=-1)),
    Malformed(
        "q_reduce",
        "q_reduce: must be 'none', 'mean' or 'max'; got 'sum'",
        set_options(q_reduce="sum"),
    ),
    Malformed(
        "block_q alone", "block_q: must be 1 with q_reduce 'none'; got 4", set_options(block_q=4)
    ),
    Malformed(
        "head_reduce",
        "head_reduce: must be 'none', 'group_max', 'group_mean' or 'softmax_vote'; got 'max'",
        set_options(head_reduce="max"),
    ),
    Malformed(
        "scale", "scale: must be at most 2^127 in size; got inf", set_options(scale=float("inf"))
    ),
    Malformed("num_sink", "num_sink: must not be negative; got -1", set_options(num_sink=-1)),
    Malformed("num_recent", "num_recent: must not be negative; got -2", set_options(num_recent=-2)),
    Malformed(
        "seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        set_options(seqlens_k=torch.zeros(3, dtype=torch.int32)),
    ),
    Malformed(
        "missing page",
        "block_table: must hold pages below 2 up to the length; got 7",
        set_options(block_table=ints([0], [7])),
        values=True,
    ),
)
