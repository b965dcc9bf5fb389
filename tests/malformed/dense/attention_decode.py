"""Malformed calls of attention_decode."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options
from malformed.dense.attention import KINDS
from torch import Tensor

from tokenmill import masks


def _caches(change: Any, **options: Any) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[1:] = [change(t) for t in args[1:]]
        kwargs.update(options)

    return edit


def _float8(**options: Any) -> Any:
    return _caches(lambda t: t.to(torch.float8_e4m3fn), **options)


def _packed(starts: Tensor, **options: Any) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[0] = args[0][:, 0]
        kwargs.update(cu_seqlens_q=starts, **options)

    return edit


def _pages(t: Tensor) -> Tensor:
    """The cache [3, 64, ...] as 12 pages of 16 tokens."""
    return t.reshape(12, 16, *t.shape[2:])


_TABLE = ints([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])

# Edits of the first sample: q [3, 1, 4, 32], k_cache and v_cache [3, 64, 2, 32], lengths 37, 64, 5.
CALLS = (
    Malformed(
        "rank", "q: must have 4 dimensions [B, Sq, H, D]; got 3", set_argument(0, lambda q: q[0])
    ),
    Malformed(
        "cache rank",
        "v_cache: must have 4 dimensions [B, S, Hk, D] (in pages: [P, page size, Hk, D]); got 5",
        set_argument(2, lambda v: v[None]),
    ),
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int64",
        set_argument(0, lambda q: q.long()),
    ),
    Malformed(
        "cache dtype",
        "k_cache: must have the dtype of q, float32, or float8_e4m3fn; got float16",
        set_argument(1, lambda k: k.half()),
    ),
    Malformed(
        "two cache dtypes",
        "v_cache: must have the dtype of k_cache, float8_e4m3fn; got float32",
        set_argument(1, lambda k: k.to(torch.float8_e4m3fn)),
    ),
    Malformed(
        "wide keys",
        "q: must have a head dimension of 1 to 576; got 577",
        set_argument(0, lambda q: q.new_zeros(3, 1, 4, 577)),
    ),
    Malformed(
        "wide values",
        "v_cache: must have a head dimension of 1 to 512; got 513",
        set_argument(2, lambda v: v.new_zeros(3, 64, 2, 513)),
    ),
    Malformed(
        "scales of float32",
        "k_scale: requires a cache in float8_e4m3fn; got float32",
        set_options(k_scale=torch.ones(1)),
    ),
    Malformed(
        "shape of scales",
        "v_scale: must have shape [1], [2] or [3, 64, 2]; got [3, 64, 1]",
        _float8(v_scale=torch.ones(3, 64, 1)),
    ),
    Malformed(
        "dtype of scales",
        "k_scale: must be float32; got float16",
        _float8(k_scale=torch.ones(2).half()),
    ),
    Malformed(
        "cache layout",
        "k_cache: must have a contiguous last dimension; strides; got [4096, 2, 1, 128]",
        set_argument(1, lambda k: torch.empty_strided(k.shape, (4096, 2, 1, 128)).copy_(k)),
    ),
    Malformed(
        "head dimensions differ",
        "k_cache: must have the head dimension of q, 32; got 16",
        set_argument(1, lambda k: k[..., :16]),
    ),
    Malformed(
        "shapes of the caches",
        "v_cache: must have the shape of k_cache up to the head dimension, [3, 64, 2, 32]; "
        "got [3, 63, 2, 32]",
        set_argument(2, lambda v: v[:, 1:]),
    ),
    Malformed(
        "GQA ratio",
        "k_cache: number of heads must divide that of q, 4 (GQA); got 3",
        _caches(lambda t: t[:, :, :1].expand(-1, -1, 3, -1)),
    ),
    Malformed(
        "batch",
        "k_cache: must have the batch size of q, 3; got 2",
        _caches(lambda t: t[:2]),
    ),
    Malformed(
        "page size",
        "k_cache: must have pages of a power of two of tokens; got 12",
        _caches(lambda t: t[:, :12], block_table=_TABLE),
    ),
    *KINDS,
    Malformed(
        "prefix",
        "mask: must not be a prefix with a cache; got 'prefix'",
        set_options(mask=masks.prefix(torch.zeros(3, dtype=torch.int32))),
    ),
    Malformed(
        "segments of less than the cache",
        "mask_k_spans: must have shape [3 or 1, 64 or more, 2]; got [1, 9, 2]",
        set_options(
            mask=masks.segments(
                torch.zeros(3, 1, dtype=torch.int32), torch.zeros(1, 9, dtype=torch.int32)
            )
        ),
    ),
    Malformed(
        "lse of sigmoid",
        "return_lse: needs kind 'softmax' or normalize 'sum', not; got 'sigmoid'",
        set_options(kind="sigmoid", normalize="count"),
    ),
    Malformed(
        "scale", "scale: must be at most 2^127 in size; got inf", set_options(scale=float("inf"))
    ),
    Malformed(
        "softcap",
        "softcap: must be finite and not negative (0 = off); got -1",
        set_options(softcap=-1.0),
    ),
    Malformed(
        "window", "window: left must be >= -1 (-1 = no limit); got -2", set_options(window=(-2, 0))
    ),
    Malformed(
        "window to the right",
        "window: right must be -1 or 0 where queries are causal: none sees a later key; got 3",
        set_options(window=(4, 3)),
    ),
    Malformed(
        "rank of packed queries",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens_q=ints(0, 1, 2, 3)),
    ),
    Malformed(
        "starts dtype",
        "cu_seqlens_q: must be int32; got int64",
        _packed(ints(0, 1, 2, 3, dtype=torch.int64)),
    ),
    Malformed(
        "starts of other requests",
        "k_cache: must have the batch size of q, 2; got 3",
        _packed(ints(0, 1, 3)),
    ),
    Malformed(
        "bound without starts",
        "max_seqlen_q: requires cu_seqlens_q; got 4",
        set_options(max_seqlen_q=4),
    ),
    Malformed(
        "negative bound",
        "max_seqlen_q: must not be negative; got -1",
        _packed(ints(0, 1, 2, 3), max_seqlen_q=-1),
    ),
    Malformed(
        "segments of packed queries",
        "mask: must be only ranges with cu_seqlens_q; got 'segments'",
        _packed(
            ints(0, 1, 2, 3),
            mask=masks.segments(
                torch.zeros(3, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
            ),
        ),
    ),
    Malformed(
        "starts that decrease",
        "cu_seqlens_q: must not decrease; got [0, 2, 1, 3]",
        _packed(ints(0, 2, 1, 3)),
        values=True,
    ),
    Malformed(
        "starts of fewer tokens",
        "cu_seqlens_q: must end at the number of tokens, 3; got 2",
        _packed(ints(0, 1, 2, 2)),
        values=True,
    ),
    Malformed(
        "bound below a request",
        "max_seqlen_q: must be at least the longest sequence, 2; got 1",
        _packed(ints(0, 2, 2, 3), max_seqlen_q=1),
        values=True,
    ),
    Malformed(
        "splits", "num_splits: must be 0 (automatic) to 1024; got -1", set_options(num_splits=-1)
    ),
    Malformed(
        "schedule",
        "schedule: must be 'auto', 'split' or 'stream_k'; got 'lean'",
        set_options(schedule="lean"),
    ),
    Malformed(
        "splits of stream_k",
        "schedule: must be 'auto' or 'split' with num_splits 2; got 'stream_k'",
        set_options(num_splits=2, schedule="stream_k"),
    ),
    Malformed(
        "lengths dtype",
        "seqlens_k: must be int32; got int64",
        set_options(seqlens_k=ints(37, 64, 5, dtype=torch.int64)),
    ),
    Malformed(
        "lengths shape",
        "seqlens_k: must have shape [3]; got [2]",
        set_options(seqlens_k=ints(37, 64)),
    ),
    Malformed(
        "table shape",
        "block_table: must have shape [3, pages]; got [2, 4]",
        _caches(_pages, block_table=_TABLE[:2]),
    ),
    Malformed(
        "table dtype",
        "block_table: must be int32; got int64",
        _caches(_pages, block_table=_TABLE.long()),
    ),
    Malformed(
        "score_bias shape",
        "score_bias: must have shape [4] or [3, 4]; got [3]",
        set_options(score_bias=torch.zeros(3)),
    ),
    Malformed("sink shape", "sink: must have shape [4]; got [1]", set_options(sink=torch.zeros(1))),
    Malformed(
        "length",
        "seqlens_k: must be 0 to what the cache holds of a request, 64; got 65",
        set_options(seqlens_k=ints(37, 65, 5)),
        values=True,
    ),
    Malformed(
        "negative length",
        "seqlens_k: must be 0 to what the cache holds of a request, 64; got -1",
        set_options(seqlens_k=ints(37, 64, -1)),
        values=True,
    ),
    Malformed(
        "page out of range",
        "block_table: must name pages below 12 where keys lie; got 12",
        _caches(_pages, block_table=torch.where(_TABLE == 4, 12, _TABLE)),
        values=True,
    ),
    Malformed(
        "negative page",
        "block_table: must name pages below 12 where keys lie; got -1",
        _caches(_pages, block_table=torch.where(_TABLE == 2, -1, _TABLE)),
        values=True,
    ),
)
