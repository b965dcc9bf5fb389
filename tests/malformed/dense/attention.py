"""Malformed calls of attention."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, ints, set_argument, set_options

from tokenmill import masks


def _pack(**changes: Any) -> Any:
    """The first sample, modified, as two packed sequences of 33 tokens."""

    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[:] = [a.flatten(0, 1) for a in args]
        cu = ints(0, 33, 66)
        kwargs.update({"cu_seqlens_q": cu, "cu_seqlens_k": cu, **changes})

    return edit


# Rules of every operator with a kind and a normaliser.
KINDS = (
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

# Edits of the first sample: q [2, 33, 4, 32], k and v [2, 33, 2, 32].
CALLS = (
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
    *KINDS,
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
        "max_seqlen_q: requires cu_seqlens; got 5",
        set_options(max_seqlen_q=5),
    ),
    Malformed(
        "packed rank",
        "q: must have 3 dimensions [T, H, D] (packed); got 4",
        set_options(cu_seqlens_q=ints(0, 33)),
    ),
    Malformed(
        "cu_seqlens alone",
        "cu_seqlens_q: must be given with its counterpart; got None",
        _pack(cu_seqlens_q=None),
    ),
    Malformed(
        "cu_seqlens dtype",
        "cu_seqlens_q: must be int32; got int64",
        _pack(cu_seqlens_q=ints(0, 66, dtype=torch.int64)),
    ),
    Malformed(
        "cu_seqlens shape",
        "cu_seqlens_k: must have 1 dimension of at least 1 element; got [0]",
        _pack(cu_seqlens_k=ints()),
    ),
    Malformed(
        "cu_seqlens lengths",
        "cu_seqlens_k: must have the length of cu_seqlens_q, 3; got 2",
        _pack(cu_seqlens_k=ints(0, 66)),
    ),
    Malformed(
        "max_seqlen negative", "max_seqlen_k: must not be negative; got -1", _pack(max_seqlen_k=-1)
    ),
    Malformed(
        "cu_seqlens start",
        "cu_seqlens_q: must start at 0; got 1",
        _pack(cu_seqlens_q=ints(1, 33, 66)),
        values=True,
    ),
    Malformed(
        "cu_seqlens order",
        "cu_seqlens_q: must not decrease; got [0, 70, 66]",
        _pack(cu_seqlens_q=ints(0, 70, 66)),
        values=True,
    ),
    Malformed(
        "cu_seqlens end",
        "cu_seqlens_k: must end at the number of tokens, 66; got 65",
        _pack(cu_seqlens_k=ints(0, 33, 65)),
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
