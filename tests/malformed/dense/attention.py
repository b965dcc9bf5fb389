"""Malformed calls of attention."""

from __future__ import annotations

import torch
from malformed import Call, ints, refused, refused_values
from malformed.rules import kinds, offsets, option, out, per_head, qkv, rank, scale
from torch import zeros

from tokenmill import masks


def _packed(call: Call) -> None:
    """Two packed sequences of 33 tokens."""
    call.update({name: call[name].flatten(0, 1) for name in "qkv"})
    call.update(dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), ints(0, 33, 66)))


_SIGMOID = {"kind": "sigmoid", "return_lse": False}
_DECAY = masks.decay2d(torch.ones(4), width=3)

# Edits of the first sample: q [2, 33, 4, 32], k and v [2, 33, 2, 32].
CALLS = (
    *qkv([2, 33, 4, 32], [2, 33, 2, 32]),
    *kinds(),
    *scale(),
    *per_head(2, 4),
    *option("mask", "must be of tokenmill.masks, or a tuple of at most one of each class", 3),
    refused(
        "mask: must not be a prefix where queries are causal; got 'prefix'",
        mask=masks.prefix(ints(0, 0)),
        causal=True,
    ),
    refused(
        "mask: lengths of prefix must have shape [2]; got [3]",
        mask=masks.prefix(ints(0, 0, 0)),
    ),
    refused(
        "mask_q_spans: must have shape [2 or 1, 33, 2]; got [1, 9, 2]",
        mask=masks.segments(zeros(1, 9, dtype=torch.int32)),
    ),
    refused(
        "mask_ranges: must have shape [2 or 1, 4 or 1, 33, 1 to 4, 2]; got [1, 3, 33, 1, 2]",
        mask=masks.ranges(*zeros(2, 1, 3, 33, 1, dtype=torch.int32)),
    ),
    refused("grid_width: needs alibi_slopes; got 3", alibi_grid=masks.grid(3)),
    refused("post_decay: needs kind 'softmax', not; got 'sigmoid'", post_decay=_DECAY, **_SIGMOID),
    refused("sink: needs kind 'softmax', not; got 'sigmoid'", sink=zeros(4), **_SIGMOID),
    *option("precision", "must be 'accurate' or 'fast'", "fp8"),
    refused(
        "bias: must broadcast to [B, H, Sq, Sk] = [2, 4, 33, 33]; got [1, 1, 33, 32]",
        bias=zeros(33, 32),
    ),
    refused("bias: must be float32; got int32", bias=zeros(33, 33, dtype=torch.int32)),
    *option("max_seqlen_q", "requires cu_seqlens", 5),
    rank("q", "[T, H, D] (packed)", got=4, cu_seqlens_q=ints(0, 33)),
    refused(
        "cu_seqlens_q: must be given with its counterpart; got None", _packed, cu_seqlens_q=None
    ),
    refused(
        "cu_seqlens_k: must have the length of cu_seqlens_q, 3; got 2",
        _packed,
        cu_seqlens_k=ints(0, 66),
    ),
    refused("max_seqlen_k: must not be negative; got -1", _packed, max_seqlen_k=-1),
    refused_values(
        "max_seqlen_q: must be at least the longest sequence, 33; got 32", _packed, max_seqlen_q=32
    ),
    *offsets("cu_seqlens_q", _packed, [0, 33, 66], [0, 70, 66]),
    *offsets("cu_seqlens_k", _packed, [0, 33, 66], [0, 70, 66]),
    *out([2, 33, 4, 32], [2, 33, 2, 32]),
)
