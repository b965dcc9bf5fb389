"""Malformed calls of linear_attention."""

from __future__ import annotations

import torch
from malformed import Call, ints, refused, refused_values
from malformed.rules import offsets, option, out, qkv, rank, scale, sliced, tensor
from torch import zeros


def _packed(call: Call) -> None:
    """Two packed sequences of 33 tokens."""
    call.update({name: call[name].flatten(0, 1) for name in "qkv"})


# Edits of the first sample: q [2, 33, 4, 32], k and v [2, 33, 2, 32], log_decay [4].
CALLS = (
    *qkv([2, 33, 4, 32], [2, 33, 2, 32]),
    rank("q", "[T, H, D] (packed)", got=4, cu_seqlens=ints(0, 33)),
    refused(
        "k: must have the length of q, 33; got 32", sliced("k", "v", at=(slice(None), slice(32)))
    ),
    *option("feature_map", "must be 'identity', 'elu1', 'relu', 'silu' or 'taylor2'", "softmax"),
    refused(
        "q: must have a head dimension of 1 to 32 with 'taylor2'; got 33",
        q=zeros(2, 33, 4, 33),
        k=zeros(2, 33, 2, 33),
        feature_map="taylor2",
    ),
    *scale(),
    *tensor("log_decay", "[4], [2, 33, 4] or [2, 33, 4, 32]", [2, 4]),
    refused(
        "log_decay: must have shape [4], [2, 33, 4] or [2, 33, 4, 32]; got [2, 33, 4, 1]",
        log_decay=zeros(2, 33, 4, 1),
    ),
    refused(
        "feature_map: must be 'identity' with a log_decay per channel; got 'elu1'",
        log_decay=zeros(2, 33, 4, 32),
        feature_map="elu1",
    ),
    refused(
        "normalize: must be False with a log_decay per channel; got True",
        log_decay=zeros(2, 33, 4, 32),
        normalize=True,
    ),
    refused_values(
        "log_decay: must not be positive; largest; got 0.25",
        log_decay=torch.full((2, 33, 4, 32), 0.25),
    ),
    *option("log_decay", "must be a tensor or None", -0.5),
    refused_values(
        "log_decay: must not be positive; largest; got 0.5",
        log_decay=torch.tensor([-1.0, 0.5, 0.25, 0.0]),
    ),
    *tensor("initial_state", "[2, 4, 32, 32]", [2, 2, 32, 32], "float32", "bfloat16"),
    refused(
        "initial_state: must have shape [2, 4, 32, 33]; got [2, 4, 32, 32]",
        initial_state=zeros(2, 4, 32, 32),
        normalize=True,
    ),
    *option("chunk_size", "must be a power of two from 16 to 256", 48),
    *option("chunk_size", "must be an integer or None", "auto"),
    *offsets("cu_seqlens", _packed, [0, 33, 66], [0, 70, 66]),
    *out([2, 33, 4, 32], [2, 33, 2, 32]),
)
