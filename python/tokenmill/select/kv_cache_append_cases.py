"""Sample calls of kv_cache_append."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


def _sample(
    pages: int = 3,
    page_size: int = 4,
    hk: int = 2,
    d: int = 16,
    dv: int | None = 16,
    slots: tuple[int, ...] = (7, -1, 0, 8, 5),
    heads: int | None = None,
    pairs: int | None = None,
    float8: bool = False,
    k_scale: str | None = None,
    v_scale: str | None = None,
    wide: bool = False,
    **options: Any,
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        tokens = len(slots)
        kind = torch.int64 if wide else torch.int32
        caches = [None if n is None else draw(pages, page_size, hk, n) for n in (d, dv)]
        if float8:
            caches = [t if t is None else t.to(torch.float8_e4m3fn) for t in caches]
        rows = [None if n is None else draw(tokens, hk, n) for n in (d, dv)]
        args = (*caches, *rows, torch.tensor(slots, dtype=kind))
        given = dict(options)
        if heads is not None:
            given["q"] = draw(tokens, heads, d)
        if pairs is not None:
            angle = 6.3 * torch.rand(9, pairs, generator=g)
            at = torch.randint(9, (tokens,), generator=g).to(kind)
            given["rope"] = (angle.cos(), angle.sin(), at)
        for name, shape in (("k_scale", k_scale), ("v_scale", v_scale)):
            if shape is not None:
                size = {"one": (1,), "head": (hk,), "token": (pages, page_size, hk)}[shape]
                given[name] = 0.004 + 0.01 * torch.rand(size, generator=g)
        return args, given

    return make


SAMPLES = (
    Sample("as they come", _sample()),
    Sample("keys and queries turned", _sample(heads=4, pairs=8)),
    Sample("interleaved", _sample(heads=2, pairs=8, interleaved=True, wide=True, dv=8)),
    Sample("float8", _sample(float8=True)),
    Sample("float8, scales of heads", _sample(float8=True, pairs=8, k_scale="head", v_scale="one")),
    Sample(
        "float8, scales of tokens",
        _sample(float8=True, heads=6, pairs=8, k_scale="token", v_scale="token"),
    ),
    Sample(
        "part of the columns",
        _sample(d=21, dv=9, pairs=7, float8=True, k_scale="token", v_scale="head", hk=1, heads=3),
    ),
    Sample(
        "part, interleaved",
        _sample(d=40, dv=24, pairs=16, interleaved=True, float8=True, k_scale="one", heads=2),
    ),
    Sample(
        "wide heads",
        _sample(hk=1, d=256, dv=250, pairs=128, slots=(5,), float8=True, v_scale="token"),
    ),
    Sample(
        "latent, float8",
        _sample(
            hk=1,
            d=576,
            dv=None,
            slots=(7, -1),
            heads=2,
            pairs=32,
            rope_offset=512,
            float8=True,
            k_scale="token",
        ),
    ),
    Sample(
        "latent, its parts apart",
        _sample(hk=1, d=64, dv=512, slots=(3,), pairs=16, rope_offset=32, interleaved=True),
    ),
    Sample("in the middle", _sample(d=21, dv=None, heads=4, pairs=7, rope_offset=3)),
    Sample(
        "in the middle, interleaved",
        _sample(d=40, dv=None, heads=2, pairs=8, rope_offset=8, interleaved=True, float8=True),
    ),
    Sample("dense", _sample(pages=2, page_size=7, slots=(7, 13, 0), wide=True)),
    Sample("no tokens", _sample(slots=(), heads=4, pairs=8, float8=True, k_scale="token")),
    Sample("all left out", _sample(slots=(-1, -1), heads=4, pairs=8)),
)
