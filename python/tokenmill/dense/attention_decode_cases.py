"""Sample calls of attention_decode."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..registry import Sample
from .attention_cases import Arguments, with_options
from .attention_draws import draw_masks, draw_ranges, draw_segments, draw_tensor


def draw_cache(
    lengths: Sequence[int],
    page_size: int | None,
    capacity: int,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    g: torch.Generator,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Caches of keys and values with room for `capacity` tokens per request, dense or in shuffled
    pages, NaN after the last key; also seqlens_k and block_table.
    """
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


def draw_scale(kind: str | None, cache: Tensor, g: torch.Generator) -> Tensor | None:
    """kind: "one", "head" or "token". Scales of tokens are NaN where the cache [P, page size, Hk,
    D] is NaN.
    """
    if kind is None:
        return None
    scale = 0.5 + torch.rand(cache.shape[:3], generator=g)
    if kind == "token":
        scale[cache[..., 0].isnan()] = float("nan")
        return scale
    return torch.rand(cache.shape[2] if kind == "head" else 1, generator=g) + 0.5


def in_float8(
    caches: list[Tensor], scales: Sequence[str | None], g: torch.Generator
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Caches of keys and values as float8_e4m3fn, and their scales."""
    named = zip(("k_scale", "v_scale"), scales, caches, strict=True)
    drawn = {name: draw_scale(kind, cache, g) for name, kind, cache in named}
    given = {name: scale for name, scale in drawn.items() if scale is not None}
    return [cache.to(torch.float8_e4m3fn) for cache in caches], given


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
    float8: Sequence[str | None] | None = None,
    latent: bool = False,
    **options: Any,
) -> Any:
    """queries: number for each request, packed, instead of sq. float8: the kind of scales for
    caches in float8_e4m3fn. latent: the values are the first channels of the keys.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        shape = (len(lengths), sq) if queries is None else (sum(queries),)
        q = torch.randn(*shape, h, d, generator=g).to(dtype)
        (k, v), kwargs = draw_cache(lengths, page_size, capacity, ((hk, d), (hk, dv)), dtype, g)
        if queries is not None:
            ends = [0, *itertools.accumulate(queries)]
            kwargs["cu_seqlens_q"] = torch.tensor(ends, dtype=torch.int32)
        if float8 is not None:
            (k, v), scales = in_float8([k, v], float8, g)
            kwargs.update(scales)
        if latent:
            v = k[..., :dv]
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
    Sample("float8", decode_call(float8=(None, None))),
    Sample(
        "float8 in pages, scales of heads",
        decode_call(
            (33, 60, 0),
            sq=3,
            h=6,
            page_size=16,
            float8=("head", "one"),
            alibi_slopes=draw_tensor(6, positive=True),
            softcap=3.0,
            window=(20, 0),
            return_lse=True,
        ),
    ),
    Sample(
        "float8, scales of tokens, splits",
        decode_call(
            (70, 40),
            d=20,
            dv=12,
            capacity=70,
            float8=("token", "token"),
            kind="sigmoid",
            normalize="sum",
            num_splits=3,
            return_lse=True,
        ),
    ),
    Sample(
        "float8, packed, scales of tokens",
        decode_call(
            (40, 20, 7),
            queries=(17, 1, 3),
            page_size=8,
            float8=("token", "head"),
            sink=draw_tensor(4),
            return_lse=True,
        ),
    ),
    Sample("invariant", decode_call((40, 7, 0), sq=2, page_size=8, invariant=True)),
    Sample("invariant, packed", decode_call((40, 20, 7), queries=(17, 0, 3), invariant=True)),
    Sample("latent", decode_call((30, 7), h=3, hk=1, d=576, dv=512, capacity=32, latent=True)),
    Sample(
        "latent, float8, packed",
        decode_call(
            (20, 5),
            queries=(2, 1),
            h=3,
            hk=1,
            d=272,
            dv=260,
            page_size=8,
            capacity=24,
            float8=("one", None),
            latent=True,
        ),
    ),
)
