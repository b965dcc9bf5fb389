"""Calls of attention_decode that every backend must answer, and calls that every backend must
refuse."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import masks
from .._edits import set_argument, set_options
from ..registry import Malformed, Sample
from .attention_cases import MALFORMED_KINDS, Arguments, with_options
from .attention_draws import draw_masks, draw_ranges, draw_segments, draw_tensor


def draw_cache(
    lengths: Sequence[int],
    page_size: int | None,
    capacity: int,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    g: torch.Generator,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Caches of keys and values with room for `capacity` tokens a request, dense or in shuffled
    pages, NaN after the last key; seqlens_k and block_table."""
    batch, kwargs = len(lengths), {"seqlens_k": torch.tensor(lengths, dtype=torch.int32)}
    caches = [torch.randn(batch, capacity, *shape, generator=g).to(dtype) for shape in shapes]
    for cache in caches:
        for b, length in enumerate(lengths):
            cache[b, length:] = float("nan")
    if page_size is None:
        return caches, kwargs
    pages = capacity // page_size
    order = torch.randperm(batch * pages + 1, generator=g)[: batch * pages]
    found = []
    for cache in caches:
        paged = torch.full((batch * pages + 1, page_size, *cache.shape[2:]), float("nan"))
        paged = paged.to(dtype)
        paged[order] = cache.reshape(batch * pages, page_size, *cache.shape[2:])
        found.append(paged)
    table = order.view(batch, pages).int()
    for b, length in enumerate(lengths):
        table[b, -(-length // page_size) :] = -1
    return found, kwargs | {"block_table": table}


def decode_call(
    lengths: Sequence[int] = (37, 64, 5),
    sq: int = 1,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
    page_size: int | None = None,
    capacity: int = 64,
    queries: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    """queries: of each request, packed, instead of sq."""

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        shape = (len(lengths), sq) if queries is None else (sum(queries),)
        q = torch.randn(*shape, h, d, generator=g).to(dtype)
        (k, v), kwargs = draw_cache(lengths, page_size, capacity, ((hk, d), (hk, dv)), dtype, g)
        if queries is not None:
            ends = [0, *itertools.accumulate(queries)]
            kwargs["cu_seqlens_q"] = torch.tensor(ends, dtype=torch.int32)
        return (q, k, v), kwargs | with_options(options, dtype, g)

    return make


SAMPLES = (
    Sample("dense", decode_call()),
    Sample("pages", decode_call((50, 0, 128), page_size=16, capacity=128)),
    Sample("pages of one token", decode_call((7, 21), h=6, hk=1, page_size=1, capacity=24)),
    Sample("several tokens", decode_call((70, 3, 128), sq=5, capacity=128, d=24, dv=40)),
    Sample(
        "every term",
        decode_call(
            (33, 60),
            sq=3,
            h=6,
            alibi_slopes=draw_tensor(2, 6, positive=True),
            score_bias=draw_tensor(6),
            softcap=3.0,
            sink=draw_tensor(6),
            window=(20, 0),
        ),
    ),
    Sample(
        "sigmoid",
        decode_call((40, 9, 0), page_size=8, kind="sigmoid", score_bias="neg_log_n"),
    ),
    Sample(
        "sigmoid, every term",
        decode_call(
            (64, 17),
            sq=2,
            d=20,
            dv=12,
            kind="sigmoid",
            score_bias=draw_tensor(2, 4),
            alibi_slopes=draw_tensor(4, positive=True),
            softcap=4.0,
            window=(30, -1),
        ),
    ),
    Sample(
        "relu by count",
        decode_call((40, 9, 0), page_size=8, kind="relu", normalize="count"),
    ),
    Sample(
        "elu1 by sum, every term",
        decode_call(
            (64, 17),
            sq=2,
            d=20,
            dv=12,
            kind="elu1",
            normalize="sum",
            return_lse=True,
            score_bias=draw_tensor(2, 4),
            alibi_slopes=draw_tensor(4, positive=True),
            softcap=4.0,
            window=(30, -1),
        ),
    ),
    Sample(
        "linear by sum, splits",
        decode_call(
            (150, 40),
            capacity=150,
            kind="linear",
            normalize="sum",
            return_lse=True,
            num_splits=3,
        ),
    ),
    Sample("taylor2", decode_call((50, 7), sq=3, h=6, kind="taylor2", score_bias=-0.5)),
    Sample(
        "sigmoid by sum, stream_k",
        decode_call(
            (150, 1),
            capacity=150,
            kind="sigmoid",
            normalize="sum",
            return_lse=True,
            schedule="stream_k",
        ),
    ),
    Sample(
        "segments",
        decode_call(
            (50, 7, 0),
            capacity=50,
            mask=draw_segments((3, 1), (3, 50), rule="not_after", shared=3),
        ),
    ),
    Sample(
        "pages, segments and ranges",
        decode_call(
            (64, 17),
            sq=3,
            page_size=16,
            mask=draw_masks(
                draw_segments((2, 3), (1, 80), sort=False), draw_ranges(2, 4, 3, 2, keys=64)
            ),
        ),
    ),
    Sample(
        "relu by count, ranges, splits",
        decode_call(
            (150, 40),
            capacity=150,
            kind="relu",
            normalize="count",
            num_splits=3,
            mask=draw_ranges(1, 4, 1, 3, keys=150),
        ),
    ),
    Sample(
        "packed",
        decode_call((70, 3, 0, 128, 40), queries=(40, 1, 0, 3, 1), capacity=128, return_lse=True),
    ),
    Sample(
        "packed, pages, every term",
        decode_call(
            (90, 64, 20, 7),
            queries=(33, 64, 2, 9),
            h=6,
            d=24,
            dv=40,
            page_size=16,
            capacity=96,
            alibi_slopes=draw_tensor(4, 6, positive=True),
            score_bias=draw_tensor(6),
            softcap=3.0,
            sink=draw_tensor(6),
            window=(30, 0),
            return_lse=True,
        ),
    ),
    Sample(
        "packed, sigmoid, not causal",
        decode_call(
            (40, 9),
            queries=(20, 17),
            page_size=1,
            kind="sigmoid",
            score_bias="neg_log_n",
            causal=False,
            window=(-1, 4),
            max_seqlen_q=20,
        ),
    ),
    Sample(
        "packed, ranges, relu by count",
        decode_call(
            (60, 33),
            queries=(25, 2),
            page_size=32,
            kind="relu",
            normalize="count",
            mask=draw_ranges(1, 4, 27, 2, keys=60),
        ),
    ),
    Sample(
        "not causal, segments",
        decode_call(
            (50, 7, 0),
            sq=20,
            capacity=50,
            causal=False,
            mask=draw_segments((3, 20), (3, 50), sort=False),
            return_lse=True,
        ),
    ),
    Sample("many queries", decode_call((90, 200), sq=70, capacity=200, page_size=8, h=2)),
    Sample("packed, no requests", decode_call((), queries=())),
    Sample("splits", decode_call((300, 80), capacity=300, num_splits=3)),
    Sample("stream_k", decode_call((300, 1, 130), capacity=300, schedule="stream_k")),
    Sample("wide heads", decode_call((40,), h=3, hk=1, d=200, dv=136)),
    Sample("many rows", decode_call((90,), sq=5, h=17, hk=1, d=16, dv=64, capacity=96)),
    Sample("no room", decode_call((0, 0), capacity=0)),
    Sample("no queries", decode_call(sq=0)),
    Sample("no requests", decode_call(())),
)


def _caches(change: Any, **options: Any) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[1:] = [change(t) for t in args[1:]]
        kwargs.update(options)

    return edit


def _packed(starts: Tensor, **options: Any) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[0] = args[0][:, 0]
        kwargs.update(cu_seqlens_q=starts, **options)

    return edit


def _ints(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _pages(t: Tensor) -> Tensor:
    """[3, 64, ...] as 12 pages of 16 tokens."""
    return t.reshape(12, 16, *t.shape[2:])


_TABLE = _ints([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])

# Edits of the first sample: q [3, 1, 4, 32], k_cache and v_cache [3, 64, 2, 32], lengths 37, 64, 5.
MALFORMED = (
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
        "k_cache: must have the dtype of q, float32; got float16",
        set_argument(1, lambda k: k.half()),
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
    *MALFORMED_KINDS,
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
    Malformed("scale", "scale: must be finite; got inf", set_options(scale=float("inf"))),
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
        set_options(cu_seqlens_q=_ints([0, 1, 2, 3])),
    ),
    Malformed(
        "starts dtype",
        "cu_seqlens_q: must be int32; got int64",
        _packed(_ints([0, 1, 2, 3], torch.int64)),
    ),
    Malformed(
        "starts of other requests",
        "k_cache: must have the batch size of q, 2; got 3",
        _packed(_ints([0, 1, 3])),
    ),
    Malformed(
        "bound without starts",
        "max_seqlen_q: goes with cu_seqlens_q alone; got 4",
        set_options(max_seqlen_q=4),
    ),
    Malformed(
        "negative bound",
        "max_seqlen_q: must not be negative; got -1",
        _packed(_ints([0, 1, 2, 3]), max_seqlen_q=-1),
    ),
    Malformed(
        "segments of packed queries",
        "mask: must be ranges alone with cu_seqlens_q; got 'segments'",
        _packed(
            _ints([0, 1, 2, 3]),
            mask=masks.segments(
                torch.zeros(3, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
            ),
        ),
    ),
    Malformed(
        "starts that decrease",
        "cu_seqlens_q: must not decrease; got [0, 2, 1, 3]",
        _packed(_ints([0, 2, 1, 3])),
        values=True,
    ),
    Malformed(
        "starts of fewer tokens",
        "cu_seqlens_q: must end at the number of tokens, 3; got 2",
        _packed(_ints([0, 1, 2, 2])),
        values=True,
    ),
    Malformed(
        "bound below a request",
        "max_seqlen_q: must be at least the longest sequence, 2; got 1",
        _packed(_ints([0, 2, 2, 3]), max_seqlen_q=1),
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
        set_options(seqlens_k=_ints([37, 64, 5], torch.int64)),
    ),
    Malformed(
        "lengths shape",
        "seqlens_k: must have shape [3]; got [2]",
        set_options(seqlens_k=_ints([37, 64])),
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
        set_options(seqlens_k=_ints([37, 65, 5])),
        values=True,
    ),
    Malformed(
        "negative length",
        "seqlens_k: must be 0 to what the cache holds of a request, 64; got -1",
        set_options(seqlens_k=_ints([37, 64, -1])),
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
