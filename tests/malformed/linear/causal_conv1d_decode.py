"""Malformed calls of causal_conv1d_decode."""

from __future__ import annotations

import torch
from malformed import ints, refused, refused_values
from malformed.rules import FLOATS, dtype, expanded, option, shared, tensor
from torch import zeros

OR_WIDE = "must have the dtype of x, float32, or float32"

# Edits of the first sample: x [3, 20], state [5, 20, 3], weight [20, 4], bias [20].
CALLS = (
    refused("x: must have 2 or 3 dimensions, [B, C] or [B, T, C]; got 1", x=lambda t: t[0]),
    *dtype("x", FLOATS, "int32"),
    refused(
        "state: must have shape [slots, 20, K] with K of at least 3; got [5, 20, 2]",
        state=lambda t: t[..., 1:],
    ),
    refused(
        "state: must have shape [slots, 20, K] with K of at least 3; got [5, 19, 3]",
        state=lambda t: t[:, 1:],
    ),
    *dtype("state", "must have the dtype of x, float32", "float16"),
    refused("state: must be on the device of x, cpu; got meta", state=lambda t: t.to("meta")),
    expanded("state", "[0, 3, 1]", state=lambda t: t[:1].expand(5, -1, -1)),
    shared(
        "state",
        "x",
        [60, 3, 1],
        lambda call: call.update(x=call["state"].flatten()[:60].view(3, 20)),
    ),
    refused(
        "state: must have a slot for each sequence, 3, without state_indices; got 2",
        state=lambda t: t[:2],
        state_indices=None,
    ),
    refused("weight: must have shape [20, W]; got [19, 4]", weight=lambda t: t[1:]),
    refused("weight: must have a width of 1 to 8; got 9", weight=zeros(20, 9)),
    *dtype("weight", OR_WIDE, "float16"),
    refused("bias: must have shape [20]; got [19]", bias=lambda t: t[1:]),
    *dtype("bias", OR_WIDE, "bfloat16"),
    *option("activation", "must be None or 'silu'", "swish"),
    *tensor("state_indices", "[3]", [2], "int32"),
    *(
        refused_values(
            f"state_indices: must be -1 (skip) or a slot below 5; got {slot}",
            state_indices=ints(0, slot, 1),
        )
        for slot in (5, -2)
    ),
    refused_values(
        "state_indices: must not repeat a slot; got [1, 0, 1]", state_indices=ints(1, 0, 1)
    ),
    refused("accepted: must be int32; got int64", accepted=ints(0, 1, 0, dtype=torch.int64)),
    refused("accepted: must have shape [3]; got [2]", accepted=ints(0, 1)),
    *(
        refused_values(
            f"accepted: must be 0 to the number of tokens, 1; got {count}",
            accepted=ints(0, count, 1),
        )
        for count in (2, -1)
    ),
)
