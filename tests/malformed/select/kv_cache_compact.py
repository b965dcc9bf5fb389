"""Malformed calls of kv_cache_compact."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options


def _pages_of_heads(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[2:] = [t[:, None].repeat_interleave(2, 1) for t in args[2:]]
    kwargs.update(block_table=ints([0], [1]))


def _shared_page(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[:2] = [t.reshape(10, 8, 2, 32) for t in args[:2]]
    kwargs.update(block_table=ints([0, 1, 2, 3, 4], [5, 6, 2, 8, 9]))


# Edits of the first sample: caches [2, 40, 2, 32], keep [2, 20], counts [20, 7].
CALLS = (
    Malformed(
        "rank",
        "v_cache: must have 4 dimensions [B, S, Hk, D] (in pages: [P, page size, Hk, D]); got 3",
        set_argument(1, lambda t: t[0]),
    ),
    Malformed(
        "dtype",
        "v_cache: must have the dtype of k_cache, float32; got float16",
        set_argument(1, lambda t: t.half()),
    ),
    Malformed(
        "shape",
        "v_cache: must have the shape of k_cache up to the head dimension, [2, 40, 2, 32]; "
        "got [2, 39, 2, 32]",
        set_argument(1, lambda t: t[:, 1:]),
    ),
    Malformed(
        "shape of keep",
        "keep: must have shape [B, K] or [B, 2, K]; got [2, 1, 20]",
        set_argument(2, lambda t: t[:, None]),
    ),
    Malformed(
        "dtype of keep",
        "keep: must be int32; got int64",
        set_argument(2, lambda t: t.long()),
    ),
    Malformed("counts", "counts: must have shape [2]; got [1]", set_argument(3, lambda t: t[1:])),
    Malformed(
        "requests",
        "k_cache: must have the requests of keep, 2; got 1",
        lambda a, k: a.__setitem__(slice(0, 2), [t[1:] for t in a[:2]]),
    ),
    Malformed(
        "block table",
        "block_table: must have shape [2, pages]; got [1, 3]",
        set_options(block_table=ints([0, 1, 2])),
    ),
    Malformed(
        "page size",
        "k_cache: must have pages of a power of two of tokens; got 40",
        set_options(block_table=ints([0], [1])),
    ),
    Malformed(
        "pages of heads",
        "keep: per head requires a dense cache; got [2, 2, 20]",
        _pages_of_heads,
    ),
    Malformed(
        "shape of seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        set_options(seqlens_k=ints(1, 2, 3)),
    ),
    Malformed(
        "base",
        "rerotate: must be a base of at least 1, or a tensor of inverse frequencies; got -1",
        set_options(rerotate=-1.0),
    ),
    Malformed(
        "frequencies",
        "rerotate: must have 1 to 16 frequencies; got [2, 17]",
        set_options(rerotate=torch.ones(17)),
    ),
    Malformed(
        "expanded cache",
        "k_cache: must have each element at an address of its own; strides; got [0, 64, 32, 1]",
        set_argument(0, lambda t: t[:1].expand(2, -1, -1, -1)),
    ),
    Malformed(
        "one cache twice",
        "v_cache: must not share memory with k_cache; strides; got [2560, 64, 32, 1]",
        lambda a, k: a.__setitem__(1, a[0]),
    ),
    Malformed(
        "cache over keep",
        "k_cache: must not share memory with keep; strides; got [2560, 64, 32, 1]",
        lambda a, k: a.__setitem__(2, a[0].view(torch.int32)[:, 3, 0, :20]),
    ),
    Malformed(
        "page of two requests",
        "block_table: must not name a page twice where keys lie; got 2",
        _shared_page,
        values=True,
    ),
    Malformed(
        "too long",
        "seqlens_k: must be 0 to what the cache holds of a request, 40; got 41",
        set_options(seqlens_k=ints(41, 3)),
        values=True,
    ),
    Malformed(
        "count",
        "counts: must be 0 to the entries of keep, 20; got 21",
        set_argument(3, lambda _: ints(3, 21)),
        values=True,
    ),
    Malformed(
        "slot",
        "keep: must name slots below the length of the request, 40; got 40",
        set_argument(2, lambda _: torch.full((2, 20), 40, dtype=torch.int32)),
        values=True,
    ),
    Malformed(
        "order",
        "keep: must ascend; got 5",
        set_argument(2, lambda _: torch.full((2, 20), 5, dtype=torch.int32)),
        values=True,
    ),
    Malformed(
        "negative slot",
        "keep: must name slots below the length of the request, 40; got -1",
        set_argument(3, lambda _: ints(20, 8)),
        values=True,
    ),
)
