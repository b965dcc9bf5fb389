"""Malformed calls of delta_attention."""

from __future__ import annotations

import torch
from malformed import Call, ints, refused, refused_values
from malformed.rules import (
    offsets,
    option,
    queries,
    rank,
    same_dtype,
    scale,
    tensor,
)
from torch import zeros


def _packed(call: Call) -> None:
    """Two packed sequences of 33 tokens."""
    call.update({name: call[name].flatten(0, 1) for name in ("q", "k", "v", "beta", "log_decay")})


# Edits of the first sample: q and k [2, 33, 1, 32], v [2, 33, 2, 32], the gates [2, 33, 2].
CALLS = (
    *queries([2, 33, 1, 32]),
    rank("q", "[T, H, D] (packed)", got=4, cu_seqlens=ints(0, 33)),
    same_dtype("k", "q"),
    refused("k: must be on the device of q, cpu; got meta", k=lambda t: t.to("meta")),
    refused(
        "k: must have the shape of q, [2, 33, 1, 32]; got [2, 32, 1, 32]", k=lambda t: t[:, 1:]
    ),
    refused("v: must have 4 dimensions; got 3", v=lambda t: t[0]),
    same_dtype("v", "q"),
    refused("v: must be on the device of q, cpu; got meta", v=lambda t: t.to("meta")),
    refused("v: must have a head dimension of 1 to 256; got 0", v=lambda t: t[..., :0]),
    refused(
        "v: must have the shape of q up to the heads, [2, 33, 1, 32]; got [2, 32, 2, 32]",
        v=lambda t: t[:, 1:],
    ),
    refused(
        "v: number of heads must be a multiple of that of q, 2; got 3",
        q=zeros(2, 33, 2, 32),
        k=zeros(2, 33, 2, 32),
        v=zeros(2, 33, 3, 32),
    ),
    *scale(),
    *tensor("beta", "[2, 33, 2]", [2, 33, 1], "float32", "int64"),
    *option("beta", "must be a tensor", 0.5),
    *tensor("log_decay", "[2, 33, 2] or [2, 33, 2, 32]", [2, 33, 1]),
    *option("log_decay", "must be a tensor or None", -0.5),
    refused_values(
        "log_decay: must not be positive; largest; got 0.5",
        log_decay=lambda t: t.index_fill(1, torch.tensor([7]), 0.5),
    ),
    refused_values(
        "log_decay: must not be positive; largest; got 0.25",
        log_decay=lambda t: torch.full((*t.shape, 32), 0.25),
    ),
    *option("qk_l2norm", "must be a bool", 1),
    *tensor("initial_state", "[2, 2, 32, 32]", [2, 1, 32, 32], "float32", "bfloat16"),
    *option("return_final_state", "must be a bool", 1),
    *offsets("cu_seqlens", _packed, [0, 33, 66], [0, 70, 66]),
)
