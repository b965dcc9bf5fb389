"""Malformed calls of indexer_topk_select."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options


def _pack(**options: Any) -> Any:
    """The first sequence of the first sample, packed, with other options."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[:3] = [t[0] for t in args[:3]]
        kwargs.update({"seqlens_k": None, "cu_seqlens_q": ints(0, 9), **options})

    return edit


def _packed_keys_alone(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[1] = args[1][0]
    kwargs["cu_seqlens_k"] = ints(0, 50)


def _scaled(k_scale: torch.Tensor) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[1] = args[1].to(torch.float8_e4m3fn)
        kwargs["k_scale"] = k_scale

    return edit


# Edits of the first sample: q [2, 9, 4, 16], k [2, 50, 16], weights [2, 9, 4].
CALLS = (
    Malformed(
        "activation",
        "activation: must be 'relu' or 'none'; got 'gelu'",
        set_options(activation="gelu"),
    ),
    Malformed(
        "rank of q",
        "q: must have 4 dimensions [B, S, H, D]; got 3",
        set_argument(0, lambda q: q[0]),
    ),
    Malformed(
        "rank of packed q",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens_q=ints(0, 9)),
    ),
    Malformed(
        "rank of k",
        "k: must have 3 dimensions [B, S, D] or [pages, page_size, D]; got 4",
        set_argument(1, lambda k: k[None]),
    ),
    Malformed(
        "rank of packed k",
        "k: must have 2 dimensions [T, D] (packed); got 3",
        set_options(cu_seqlens_k=ints(0, 9)),
    ),
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int32",
        set_argument(0, lambda q: q.int()),
    ),
    Malformed(
        "dtype of k",
        "k: must have the dtype of q, float32, or float8_e4m3fn; got float16",
        set_argument(1, lambda k: k.half()),
    ),
    Malformed(
        "shape of weights",
        "weights: must have shape [2, 9, 4]; got [2, 9, 3]",
        set_argument(2, lambda w: w[..., 1:]),
    ),
    Malformed(
        "dtype of weights",
        "weights: must be float32 or have the dtype of q, float32; got bfloat16",
        set_argument(2, lambda w: w.bfloat16()),
    ),
    Malformed(
        "layout",
        "k: must have a contiguous last dimension",
        set_argument(1, lambda k: k.transpose(1, 2).contiguous().transpose(1, 2)),
    ),
    Malformed(
        "layout of weights",
        "weights: must have a contiguous last dimension",
        set_argument(2, lambda w: w.repeat_interleave(2, 2)[..., ::2]),
    ),
    Malformed(
        "many heads",
        "q: must have 1 to 64 heads; got 65",
        lambda a, k: a.__setitem__(slice(0, 3, 2), [torch.zeros(2, 9, 65, 16),
                                                    torch.zeros(2, 9, 65)]),
    ),
    Malformed(
        "wide head",
        "q: must have a head dimension of 1 to 256; got 257",
        set_argument(0, lambda q: torch.zeros(2, 9, 4, 257)),
    ),
    Malformed(
        "head dimension",
        "k: must have the head dimension of q, 16; got 15",
        set_argument(1, lambda k: k[..., 1:]),
    ),
    Malformed(
        "packed keys alone",
        "cu_seqlens_q: must be given with cu_seqlens_k; got None",
        _packed_keys_alone,
    ),
    Malformed(
        "cu_seqlens_q",
        "cu_seqlens_q: must be int32; got int64",
        _pack(cu_seqlens_q=torch.tensor([0, 9])),
    ),
    Malformed(
        "cu_seqlens_k",
        "cu_seqlens_k: must have the length of cu_seqlens_q, 2; got 3",
        _pack(cu_seqlens_k=ints(0, 9, 50)),
    ),
    Malformed(
        "lengths of packed keys",
        "seqlens_k: must be None with cu_seqlens_k; got [1]",
        _pack(seqlens_k=ints(50)),
    ),
    Malformed(
        "pages of packed keys",
        "block_table: must be None with cu_seqlens_k; got [1, 1]",
        _pack(block_table=ints(0)[None]),
    ),
    Malformed(
        "batch",
        "k: must have the batch size of q, 2; got 1",
        set_argument(1, lambda k: k[:1]),
    ),
    Malformed(
        "batch of the table",
        "block_table: must have the batch size of q, 2; got 3",
        set_options(block_table=torch.zeros(3, 1, dtype=torch.int32)),
    ),
    Malformed(
        "block_table", "block_table: must be int32; got float32",
        set_options(block_table=torch.zeros(2, 1)),
    ),
    Malformed("topk", "topk: must be 1 to 65536; got 0", set_argument(3, lambda topk: 0)),
    Malformed("large topk", "topk: must be 1 to 65536; got 65537",
              set_argument(3, lambda topk: 65537)),
    Malformed("block_k", "block_k: must be 1 to 2^31 - 1; got 0", set_options(block_k=0)),
    Malformed("num_sink", "num_sink: must not be negative; got -1", set_options(num_sink=-1)),
    Malformed("num_recent", "num_recent: must not be negative; got -2", set_options(num_recent=-2)),
    Malformed(
        "seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        set_options(seqlens_k=ints(1, 2, 3)),
    ),
    Malformed(
        "scale of wide keys",
        "k_scale: requires a cache in float8_e4m3fn; got float32",
        set_options(k_scale=torch.ones(2, 50)),
    ),
    Malformed(
        "shape of scales",
        "k_scale: must have shape [1] or [2, 50]; got [2, 49]",
        _scaled(torch.ones(2, 49)),
    ),
    Malformed(
        "dtype of scales",
        "k_scale: must be float32; got float16",
        _scaled(torch.ones(2, 50, dtype=torch.float16)),
    ),
    Malformed(
        "rank of previous",
        "previous: must have 3 dimensions [B, Sq, K]; got 2",
        set_options(previous=ints(1)[None]),
    ),
    Malformed(
        "rank of packed previous",
        "previous: must have 2 dimensions [T, K] (packed); got 3",
        _pack(cu_seqlens_k=ints(0, 50), previous=ints(1)[None, None]),
    ),
    Malformed(
        "dtype of previous",
        "previous: must be int32; got int64",
        set_options(previous=torch.zeros(2, 9, 3, dtype=torch.int64)),
    ),
    Malformed(
        "lists of previous",
        "previous: must have a list for each query, [2, 9]; got [2, 8]",
        set_options(previous=torch.zeros(2, 8, 3, dtype=torch.int32)),
    ),
    Malformed(
        "entries of previous",
        "previous: must have a column; got 0",
        set_options(previous=torch.zeros(2, 9, 0, dtype=torch.int32)),
    ),
    Malformed(
        "layout of previous",
        "previous: must have a contiguous last dimension",
        set_options(previous=torch.zeros(2, 3, 9, dtype=torch.int32).mT),
    ),
    Malformed(
        "length",
        "seqlens_k: must be 0 to 50; got 51",
        set_options(seqlens_k=ints(50, 51)),
        values=True,
    ),
    Malformed(
        "missing page",
        "block_table: must hold pages below 2 up to the length; got 7",
        set_options(block_table=ints(0, 7)[:, None], seqlens_k=ints(50, 9)),
        values=True,
    ),
    Malformed(
        "ends that decrease",
        "cu_seqlens_q: must not decrease; got [0, 12, 9]",
        _pack(cu_seqlens_q=ints(0, 12, 9), cu_seqlens_k=ints(0, 9, 50)),
        values=True,
    ),
    Malformed(
        "end of packed keys",
        "cu_seqlens_k: must end at the number of tokens, 50; got 49",
        _pack(cu_seqlens_k=ints(0, 49)),
        values=True,
    ),
)  # fmt: skip
