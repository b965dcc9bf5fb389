"""Valid and malformed sample calls of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import masks
from .._edits import set_argument, set_options
from ..registry import Malformed, Sample
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


def _pack(**changes: Any) -> Any:
    """The first sample, modified, as two packed sequences of 33 tokens."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[:] = [a.flatten(0, 1) for a in args]
        cu = torch.tensor([0, 33, 66], dtype=torch.int32)
        kwargs.update({"cu_seqlens_q": cu, "cu_seqlens_k": cu, **changes})

    return edit


def _cu(*ends: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(ends, dtype=dtype)


# Edits of the first sample: q [2, 33, 4, 32], k and v [2, 33, 2, 32].
# These hold for every operator with a kind and a normaliser.
MALFORMED_KINDS = (
    Malformed(
        "kind",
        "kind: must be 'softmax', 'sigmoid', 'relu', 'elu1', 'linear' or 'taylor2'; got 'gelu'",
        set_options(kind="gelu", return_lse=False),
    ),
    Malformed(
        "normalize",
        "normalize: must be None, 'sum' or 'count'; got 'mean'",
        set_options(kind="relu", normalize="mean", return_lse=False),
    ),
    Malformed(
        "normalize of softmax",
        "normalize: needs a kind other than 'softmax'; got 'sum'",
        set_options(normalize="sum"),
    ),
)

MALFORMED = (
    Malformed(
        "rank", "q: must have 4 dimensions [B, S, H, D]; got 3", set_argument(0, lambda q: q[0])
    ),
    Malformed(
        "k rank",
        "k: must have 4 dimensions [B, S, H, D]; got 5",
        set_argument(1, lambda k: k[None]),
    ),
    Malformed(
        "dtype",
        "q: must be float16, bfloat16 or float32; got int64",
        set_argument(0, lambda q: q.long()),
    ),
    Malformed(
        "dtype mix",
        "k: must have the dtype of q, float32; got float16",
        set_argument(1, lambda k: k.half()),
    ),
    Malformed(
        "device mix",
        "v: must be on the device of q, cpu; got meta",
        set_argument(2, lambda v: v.to("meta")),
    ),
    Malformed(
        "head dimension",
        "q: must have a head dimension of 1 to 256; got 257",
        lambda a, k: a.__setitem__(slice(None), [torch.zeros(1, 2, 4, 257)] * 3),
    ),
    Malformed(
        "head dimensions differ",
        "k: must have the head dimension of q, 32; got 16",
        set_argument(1, lambda k: k[..., :16]),
    ),
    Malformed(
        "batch", "k: must have the batch size of q, 2; got 1", set_argument(1, lambda k: k[:1])
    ),
    Malformed(
        "v shape",
        "v: must have the shape of k up to the head dimension, [2, 33, 2, 32]; got [2, 32, 2, 32]",
        set_argument(2, lambda v: v[:, 1:]),
    ),
    Malformed(
        "GQA ratio",
        "k: number of heads must divide that of q, 4 (GQA); got 3",
        lambda a, k: a.__setitem__(slice(1, 3), [torch.zeros(2, 33, 3, 32)] * 2),
    ),
    *MALFORMED_KINDS,
    Malformed(
        "mask",
        "mask: must be of tokenmill.masks, or a tuple of at most one of each class; got 3",
        set_options(mask=3),
    ),
    Malformed(
        "prefix and causal",
        "mask: must not be a prefix where queries are causal; got 'prefix'",
        set_options(mask=masks.prefix(torch.zeros(2, dtype=torch.int32)), causal=True),
    ),
    Malformed(
        "prefix of another batch",
        "mask: lengths of prefix must have shape [2]; got [3]",
        set_options(mask=masks.prefix(torch.zeros(3, dtype=torch.int32))),
    ),
    Malformed(
        "segments of other queries",
        "mask_q_spans: must have shape [2 or 1, 33, 2]; got [1, 9, 2]",
        set_options(mask=masks.segments(torch.zeros(1, 9, dtype=torch.int32))),
    ),
    Malformed(
        "ranges of other heads",
        "mask_ranges: must have shape [2 or 1, 4 or 1, 33, 1 to 4, 2]; got [1, 3, 33, 1, 2]",
        set_options(mask=masks.ranges(*torch.zeros(2, 1, 3, 33, 1, dtype=torch.int32))),
    ),
    Malformed(
        "grid without slopes",
        "grid_width: needs alibi_slopes; got 3",
        set_options(alibi_grid=masks.grid(3)),
    ),
    Malformed(
        "decay of sigmoid",
        "post_decay: needs kind 'softmax', not; got 'sigmoid'",
        set_options(
            kind="sigmoid", return_lse=False, post_decay=masks.decay2d(torch.ones(4), width=3)
        ),
    ),
    Malformed(
        "precision",
        "precision: must be 'accurate' or 'fast'; got 'fp8'",
        set_options(precision="fp8"),
    ),
    Malformed(
        "lse of sigmoid",
        "return_lse: needs kind 'softmax' or normalize 'sum', not; got 'sigmoid'",
        set_options(kind="sigmoid", normalize="count"),
    ),
    Malformed(
        "scale", "scale: must be at most 2^127 in size; got nan", set_options(scale=float("nan"))
    ),
    Malformed(
        "scale tensor",
        "scale: must be a number; got a tensor of shape []",
        set_options(scale=torch.ones(())),
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
        "window type", "window: must be two ints (left, right); got 4", set_options(window=4)
    ),
    Malformed(
        "score_bias word",
        "score_bias: must be a number, 'neg_log_n' or a tensor; got 'log_n'",
        set_options(score_bias="log_n"),
    ),
    Malformed(
        "score_bias shape",
        "score_bias: must have shape [4] or [2, 4]; got [3]",
        set_options(score_bias=torch.zeros(3)),
    ),
    Malformed(
        "alibi_slopes dtype",
        "alibi_slopes: must be float32; got int64",
        set_options(alibi_slopes=torch.zeros(4, dtype=torch.int64)),
    ),
    Malformed(
        "sink of sigmoid",
        "sink: needs kind 'softmax', not; got 'sigmoid'",
        set_options(sink=torch.zeros(4), kind="sigmoid", return_lse=False),
    ),
    Malformed("sink shape", "sink: must have shape [4]; got [1]", set_options(sink=torch.zeros(1))),
    Malformed(
        "bias shape",
        "bias: must broadcast to [B, H, Sq, Sk] = [2, 4, 33, 33]; got [1, 1, 33, 32]",
        set_options(bias=torch.zeros(33, 32)),
    ),
    Malformed(
        "bias dtype",
        "bias: must be float32; got int32",
        set_options(bias=torch.zeros(33, 33, dtype=torch.int32)),
    ),
    Malformed(
        "max_seqlen alone",
        "max_seqlen_q: goes with cu_seqlens alone; got 5",
        set_options(max_seqlen_q=5),
    ),
    Malformed(
        "packed rank",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens_q=_cu(0, 33)),
    ),
    Malformed(
        "cu_seqlens alone",
        "cu_seqlens_q: must be given with its counterpart; got None",
        _pack(cu_seqlens_q=None),
    ),
    Malformed(
        "cu_seqlens dtype",
        "cu_seqlens_q: must be int32; got int64",
        _pack(cu_seqlens_q=_cu(0, 66, dtype=torch.int64)),
    ),
    Malformed(
        "cu_seqlens shape",
        "cu_seqlens_k: must have 1 dimension of at least 1 element; got [0]",
        _pack(cu_seqlens_k=_cu()),
    ),
    Malformed(
        "cu_seqlens lengths",
        "cu_seqlens_k: must have the length of cu_seqlens_q, 3; got 2",
        _pack(cu_seqlens_k=_cu(0, 66)),
    ),
    Malformed(
        "max_seqlen negative", "max_seqlen_k: must not be negative; got -1", _pack(max_seqlen_k=-1)
    ),
    Malformed(
        "cu_seqlens start",
        "cu_seqlens_q: must start at 0; got 1",
        _pack(cu_seqlens_q=_cu(1, 33, 66)),
        values=True,
    ),
    Malformed(
        "cu_seqlens order",
        "cu_seqlens_q: must not decrease; got [0, 70, 66]",
        _pack(cu_seqlens_q=_cu(0, 70, 66)),
        values=True,
    ),
    Malformed(
        "cu_seqlens end",
        "cu_seqlens_k: must end at the number of tokens, 66; got 65",
        _pack(cu_seqlens_k=_cu(0, 33, 65)),
        values=True,
    ),
    Malformed(
        "max_seqlen short",
        "max_seqlen_q: must be at least the longest sequence, 33; got 32",
        _pack(max_seqlen_q=32),
        values=True,
    ),
    Malformed(
        "out shape",
        "out: must have shape [2, 33, 4, 32]; got [2, 33, 2, 32]",
        set_options(out=torch.zeros(2, 33, 2, 32)),
    ),
    Malformed(
        "out over q",
        "out: must not share memory with q; strides; got [4224, 128, 32, 1]",
        lambda a, k: k.update(out=a[0]),
    ),
)
