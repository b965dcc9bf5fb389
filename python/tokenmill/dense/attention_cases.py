"""Sample calls of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..registry import Sample
from .attention_draws import (
    draw_decay,
    draw_mask,
    draw_masks,
    draw_prefix,
    draw_ranges,
    draw_segments,
    draw_tensor,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _qkv(
    dtype: torch.dtype,
    g: torch.Generator,
    b: int = 2,
    sq: int = 33,
    sk: int = 33,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
) -> tuple[Tensor, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    return draw(b, sq, h, d), draw(b, sk, hk, d), draw(b, sk, hk, dv)


def with_options(options: dict[str, Any], dtype: torch.dtype, g: torch.Generator) -> dict[str, Any]:
    """Resolves callables among the options: each draws a tensor from (dtype, generator)."""
    drawn = {k: o(dtype, g) if callable(o) else o for k, o in options.items()}
    return drawn if "kind" in drawn else drawn | {"return_lse": True}


def _dense(sizes: dict[str, int], **options: Any) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        return _qkv(dtype, g, **sizes), with_options(options, dtype, g)

    return make


def _packed(lengths_q: list[int], lengths_k: list[int], **options: Any) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        q, k, v = _qkv(dtype, g, b=1, sq=sum(lengths_q), sk=sum(lengths_k), d=24, dv=40)
        cu_q, cu_k = (
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            for lengths in (lengths_q, lengths_k)
        )
        lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        return (q[0], k[0], v[0]), lengths | with_options(options, dtype, g)

    return make


SAMPLES = (
    Sample("softmax", _dense({})),
    Sample("causal, more keys", _dense({"sq": 17, "sk": 65, "d": 64, "dv": 48}, causal=True)),
    Sample("causal, more queries", _dense({"sq": 40, "sk": 9}, causal=True)),
    Sample("window", _dense({"sq": 50, "sk": 50, "hk": 4}, window=(7, 3))),
    Sample("sink, softcap", _dense({"hk": 1}, sink=draw_tensor(4), softcap=5.0, window=(4, 0))),
    Sample(
        "every term",
        _dense(
            {"d": 20, "dv": 12},
            bias=draw_tensor(2, 1, 33, 33),
            alibi_slopes=draw_tensor(4, positive=True),
            score_bias=draw_tensor(2, 4),
            softcap=3.0,
            causal=True,
        ),
    ),
    Sample("packed", _packed([5, 0, 29, 1], [7, 3, 29, 0], causal=True)),
    Sample("no keys", _dense({"sk": 0})),
    Sample("no queries", _dense({"sq": 0})),
    Sample("sigmoid", _dense({"sk": 40}, kind="sigmoid", score_bias="neg_log_n")),
    Sample("sigmoid causal", _dense({"hk": 4}, kind="sigmoid", score_bias=-2.0, causal=True)),
    Sample(
        "sigmoid, every term",
        _dense(
            {"d": 18, "dv": 33},
            kind="sigmoid",
            score_bias=draw_tensor(4),
            bias=draw_tensor(1, 4, 33, 33),
            alibi_slopes=draw_tensor(2, 4, positive=True),
            softcap=4.0,
            window=(9, 9),
        ),
    ),
    Sample(
        "sigmoid packed",
        _packed([12, 3], [20, 31], kind="sigmoid", score_bias="neg_log_n", window=(8, 2)),
    ),
    Sample("sigmoid row bias", _dense({}, kind="sigmoid", bias=draw_tensor(1, 4, 33, 1))),
    Sample("key bias", _dense({}, bias=draw_tensor(2, 1, 1, 33))),
    Sample("relu causal", _dense({"sk": 40}, kind="relu", causal=True)),
    Sample(
        "relu by count",
        _dense({}, kind="relu", normalize="count", bias=draw_mask(2, 1, 33, 33), window=(20, 5)),
    ),
    Sample(
        "elu1 by sum, every term",
        _dense(
            {"d": 18, "dv": 33, "hk": 4},
            kind="elu1",
            normalize="sum",
            return_lse=True,
            score_bias=draw_tensor(4),
            bias=draw_tensor(1, 4, 33, 33),
            alibi_slopes=draw_tensor(2, 4, positive=True),
            softcap=4.0,
            window=(12, 3),
        ),
    ),
    Sample("linear, more queries", _dense({"sq": 40, "sk": 9}, kind="linear", causal=True)),
    Sample(
        "linear by sum, packed",
        _packed([5, 0, 29], [7, 3, 29], kind="linear", normalize="sum", return_lse=True),
    ),
    Sample(
        "taylor2",
        _dense({"hk": 1}, kind="taylor2", score_bias=-0.5, bias=draw_tensor(2, 1, 1, 33)),
    ),
    Sample(
        "slopes over a grid",
        _dense(
            {},
            alibi_slopes=draw_tensor(4, positive=True),
            alibi_grid=masks.grid(7, "manhattan", window=5),
        ),
    ),
    Sample(
        "few rows, invariant",
        _dense({"sq": 2, "sk": 150}, causal=True, invariant=True, softcap=4.0),
    ),
    Sample("weights that fade", _dense({}, post_decay=draw_decay(4, width=5))),
    Sample(
        "weights that fade, every term",
        _dense(
            {"d": 20, "dv": 12},
            post_decay=draw_decay(2, 4, width=6, distance="manhattan", window=8),
            bias=draw_tensor(2, 1, 33, 33),
            score_bias=draw_tensor(2, 4),
            sink=draw_tensor(4),
            softcap=3.0,
            causal=True,
        ),
    ),
    Sample("segments", _dense({"sq": 150, "sk": 150, "d": 16}, mask=draw_segments((2, 150)))),
    Sample(
        "segments in any order, shared, causal",
        _dense({}, causal=True, mask=draw_segments((2, 33), sort=False, shared=2)),
    ),
    Sample(
        "not after, more keys, every term",
        _dense(
            {"d": 20, "dv": 12, "sk": 71},
            mask=draw_segments((1, 33), (2, 71), rule="not_after", shared=4),
            bias=draw_tensor(2, 1, 33, 71),
            alibi_slopes=draw_tensor(4, positive=True),
            score_bias=draw_tensor(2, 4),
            softcap=3.0,
            window=(60, 40),
        ),
    ),
    Sample(
        "prefix, sink",
        _dense({"hk": 1}, mask=draw_prefix(20, 0), sink=draw_tensor(4), window=(25, -1)),
    ),
    Sample(
        "ranges of each head",
        _dense({"sq": 40, "sk": 90}, mask=draw_ranges(2, 4, 40, 3, keys=90)),
    ),
    Sample(
        "elu1 by sum, segments and ranges",
        _dense(
            {"hk": 1},
            kind="elu1",
            normalize="sum",
            return_lse=True,
            mask=draw_masks(draw_segments((2, 33)), draw_ranges(1, 1, 33, 2, keys=33)),
        ),
    ),
    Sample(
        "relu by count, packed, prefix and ranges",
        _packed(
            [5, 0, 29],
            [7, 3, 40],
            kind="relu",
            normalize="count",
            mask=draw_masks(draw_prefix(4, 1, 9), draw_ranges(1, 4, 34, 4, keys=40)),
        ),
    ),
    Sample(
        "sigmoid packed, segments",
        _packed(
            [30, 4],
            [41, 2],
            kind="sigmoid",
            causal=True,
            mask=draw_segments((34,), (43,), sort=False),
        ),
    ),
    Sample(
        "sigmoid by sum",
        _dense({}, kind="sigmoid", normalize="sum", return_lse=True, causal=True),
    ),
)
