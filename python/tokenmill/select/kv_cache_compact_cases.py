"""Sample calls of kv_cache_compact."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


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
