"""Samples and malformed calls of kv_cache_compact."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Malformed, Sample


def _sample(
    b: int = 2,
    s: int = 40,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
    entries: int = 20,
    counts: Any = (20, 7),
    seqlens_k: tuple[int, ...] | None = None,
    pages: int | None = None,
    page_size: int = 8,
    frequencies: int | None = None,
    **options: Any,
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        lead = (b, s) if pages is None else (b * pages, page_size)
        capacity = s if pages is None else pages * page_size
        k = torch.randn(*lead, hk, d, generator=g).to(dtype)
        v = torch.randn(*lead, hk, dv, generator=g).to(dtype)
        count = torch.tensor(counts, dtype=torch.int32)
        keep = torch.full((*count.shape, entries), -1, dtype=torch.int32)
        for at in range(count.numel()):
            n = int(count.flatten()[at])
            length = capacity if seqlens_k is None else seqlens_k[at * b // count.numel()]
            chosen = torch.randperm(length, generator=g)[:n].sort()[0]
            keep.view(count.numel(), entries)[at, :n] = chosen.int()
        given = dict(options)
        if seqlens_k is not None:
            given["seqlens_k"] = torch.tensor(seqlens_k, dtype=torch.int32)
        if pages is not None:
            given["block_table"] = torch.randperm(b * pages, generator=g).int().view(b, pages)
        if frequencies is not None:
            wide = torch.promote_types(dtype, torch.float32)
            given["rerotate"] = torch.rand(frequencies, generator=g).to(wide)
        return (k, v, keep, count), given

    return make


SAMPLES = (
    Sample("shared lists", _sample()),
    Sample("turned", _sample(rerotate=10000.0)),
    Sample(
        "lists of heads",
        _sample(counts=((20, 3), (0, 11)), compensation=True, rerotate=500.0, interleaved=True),
    ),
    Sample("sums", _sample(seqlens_k=(33, 12), counts=(5, 12), compensation=True)),
    Sample(
        "pages",
        _sample(pages=5, seqlens_k=(40, 17), counts=(20, 9), rerotate=10000.0, compensation=True),
    ),
    Sample("part of the columns", _sample(d=20, dv=9, frequencies=6)),
    Sample("part, interleaved", _sample(d=21, dv=33, hk=1, frequencies=3, interleaved=True)),
    Sample("wide heads", _sample(b=1, hk=1, d=256, dv=200, counts=(13,), rerotate=1e6)),
    Sample("all kept", _sample(s=20, counts=(20, 20), rerotate=100.0, compensation=True)),
    Sample("nothing kept", _sample(counts=(0, 0), compensation=True)),
    Sample("no entries", _sample(entries=0, counts=(0, 0))),
    Sample("no requests", _sample(b=0, counts=())),
)


def _ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _pages_of_heads(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[2:] = [t[:, None].repeat_interleave(2, 1) for t in args[2:]]
    kwargs.update(block_table=_ints([0], [1]))


def _shared_page(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[:2] = [t.reshape(10, 8, 2, 32) for t in args[:2]]
    kwargs.update(block_table=_ints([0, 1, 2, 3, 4], [5, 6, 2, 8, 9]))


# Edits of the first sample: caches [2, 40, 2, 32], keep [2, 20], counts [20, 7].
MALFORMED = (
    Malformed(
        "rank",
        "v_cache: must have 4 dimensions [B, S, Hk, D] (in pages: [P, page size, Hk, D]); got 3",
        lambda a, k: a.__setitem__(1, a[1][0]),
    ),
    Malformed(
        "dtype",
        "v_cache: must have the dtype of k_cache, float32; got float16",
        lambda a, k: a.__setitem__(1, a[1].half()),
    ),
    Malformed(
        "shape",
        "v_cache: must have the shape of k_cache up to the head dimension, [2, 40, 2, 32]; "
        "got [2, 39, 2, 32]",
        lambda a, k: a.__setitem__(1, a[1][:, 1:]),
    ),
    Malformed(
        "shape of keep",
        "keep: must have shape [B, K] or [B, 2, K]; got [2, 1, 20]",
        lambda a, k: a.__setitem__(2, a[2][:, None]),
    ),
    Malformed(
        "dtype of keep",
        "keep: must be int32; got int64",
        lambda a, k: a.__setitem__(2, a[2].long()),
    ),
    Malformed(
        "counts", "counts: must have shape [2]; got [1]", lambda a, k: a.__setitem__(3, a[3][1:])
    ),
    Malformed(
        "requests",
        "k_cache: must have the requests of keep, 2; got 1",
        lambda a, k: a.__setitem__(slice(0, 2), [t[1:] for t in a[:2]]),
    ),
    Malformed(
        "block table",
        "block_table: must have shape [2, pages]; got [1, 3]",
        lambda a, k: k.update(block_table=_ints([0, 1, 2])),
    ),
    Malformed(
        "page size",
        "k_cache: must have pages of a power of two of tokens; got 40",
        lambda a, k: k.update(block_table=_ints([0], [1])),
    ),
    Malformed(
        "pages of heads",
        "keep: per head goes with a dense cache alone; got [2, 2, 20]",
        _pages_of_heads,
    ),
    Malformed(
        "shape of seqlens_k",
        "seqlens_k: must have shape [2]; got [3]",
        lambda a, k: k.update(seqlens_k=_ints(1, 2, 3)),
    ),
    Malformed(
        "base",
        "rerotate: must be a base of at least 1, or a tensor of inverse frequencies; got -1",
        lambda a, k: k.update(rerotate=-1.0),
    ),
    Malformed(
        "frequencies",
        "rerotate: must have 1 to 16 frequencies; got [2, 17]",
        lambda a, k: k.update(rerotate=torch.ones(17)),
    ),
    Malformed(
        "expanded cache",
        "k_cache: must have each element at an address of its own; strides; got [0, 64, 32, 1]",
        lambda a, k: a.__setitem__(0, a[0][:1].expand(2, -1, -1, -1)),
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
        lambda a, k: k.update(seqlens_k=_ints(41, 3)),
        values=True,
    ),
    Malformed(
        "count",
        "counts: must be 0 to the entries of keep, 20; got 21",
        lambda a, k: a.__setitem__(3, _ints(3, 21)),
        values=True,
    ),
    Malformed(
        "slot",
        "keep: must name slots below the length of the request, 40; got 40",
        lambda a, k: a.__setitem__(2, torch.full((2, 20), 40, dtype=torch.int32)),
        values=True,
    ),
    Malformed(
        "order",
        "keep: must ascend; got 5",
        lambda a, k: a.__setitem__(2, torch.full((2, 20), 5, dtype=torch.int32)),
        values=True,
    ),
    Malformed(
        "negative slot",
        "keep: must name slots below the length of the request, 40; got -1",
        lambda a, k: a.__setitem__(3, _ints(20, 8)),
        values=True,
    ),
)
