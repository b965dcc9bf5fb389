"""Malformed calls of titans_memory."""

from __future__ import annotations

import torch
from malformed import Call, ints, refused
from malformed.rules import FLOATS, QUERIES, dtype, offsets, option, rank, same_dtype
from torch import zeros

from tokenmill.linear.titans_memory_cases import GATES


def _packed(call: Call) -> None:
    """Two packed sequences of 33 tokens."""
    call.update({name: call[name].flatten(0, 1) for name in ("q", "k", "v", *GATES)})


# Edits of the first sample: q, k and v [2, 33, 2, 16], gates [2, 33, 2].
CALLS = (
    rank("q", QUERIES),
    rank("q", "[T, H, D] (packed)", got=4, cu_seqlens=ints(0, 33)),
    *dtype("q", FLOATS, "int32"),
    *(
        refused(
            f"{name}: must have a head dimension of at least 1; got 0",
            **{name: lambda t: t[..., :0]},
        )
        for name in "qv"
    ),
    same_dtype("k", "q"),
    refused("v: must be on the device of q, cpu; got meta", v=lambda v: v.to("meta")),
    refused(
        "k: must have the shape of q, [2, 33, 2, 16]; got [2, 33, 1, 16]",
        k=lambda k: k[:, :, :1],
    ),
    refused(
        "v: must have the shape of q up to the head dimension, [2, 33, 2, 16]; got [2, 32, 2, 16]",
        v=lambda v: v[:, 1:],
    ),
    refused("alpha: must have shape [2, 33, 2]; got [2, 33]", alpha=zeros(2, 33)),
    *option("eta", "must be a tensor", 0.5),
    *dtype("theta", "must be a floating-point tensor", "int32"),
    *option("chunk_size", "must be at least 1", 0),
    *option("chunk_size", "must be an integer", "auto"),
    *option("loss", "must be 'mse'", "l1"),
    refused(
        "initial_state: must be a pair of tensors (M, S) or None; got a tensor",
        initial_state=zeros(2),
    ),
    refused(
        "initial_state: must have shape [2, 2, 16, 16]; got [2, 2, 16, 15]",
        initial_state=tuple(zeros(2, 2, 2, 16, 15)),
    ),
    refused(
        "initial_state: must be float32; got float16",
        initial_state=tuple(zeros(2, 2, 2, 16, 16, dtype=torch.float16)),
    ),
    *option("return_final_state", "must be a bool", 1),
    *offsets("cu_seqlens", _packed, [0, 33, 66], [0, 70, 66]),
)
