"""Malformed calls of delta_attention_decode."""

from __future__ import annotations

import torch
from malformed import ints, refused, refused_values
from malformed.rules import expanded, option, queries, same_dtype, scale, shared, tensor

# Edits of the first sample: q and k [3, 1, 1, 32], v [3, 1, 2, 32], beta and log_decay [3, 1, 2],
# state [5, 2, 32, 32].
CALLS = (
    *queries([3, 1, 1, 32]),
    same_dtype("k", "q"),
    refused("k: must have the batch size of q, 3; got 2", k=lambda t: t[1:]),
    refused("k: must have the shape of q, [3, 1, 1, 32]; got [3, 0, 1, 32]", k=lambda t: t[:, :0]),
    same_dtype("v", "q"),
    refused(
        "v: must have the shape of q up to the heads, [3, 1, 1, 32]; got [2, 1, 2, 32]",
        v=lambda t: t[1:],
    ),
    *scale(),
    *tensor("beta", "[3, 1, 2]", [3, 1, 1], "float32", "int64"),
    *tensor("log_decay", "[3, 1, 2] or [3, 1, 2, 32]", [3, 1, 1]),
    refused_values(
        "log_decay: must not be positive; largest; got 0.5",
        log_decay=lambda t: torch.full((*t.shape, 32), 0.5),
    ),
    *option("qk_l2norm", "must be a bool", 1),
    *tensor("state", "[slots, 2, 32, 32]", [2, 32, 32], "float32", "float16"),
    refused(
        "state: must have shape [slots, 2, 32, 32]; got [5, 2, 32, 31]", state=lambda s: s[..., 1:]
    ),
    refused(
        "state: must have the rows of a head without gaps; strides; got [2048, 1024, 1, ",
        state=lambda s: s.transpose(-1, -2),
    ),
    expanded("state", "[0, 1024, ", state=lambda s: s[:1].expand(5, -1, -1, -1)),
    shared(
        "state",
        "v",
        [2048, 1024, 32, 1],
        lambda call: call.update(v=call["state"].flatten()[64:256].view(3, 1, 2, 32)),
    ),
    refused(
        "state: must have a slot for each sequence, 3, without state_indices; got 2",
        state=lambda s: s[:2],
        state_indices=None,
    ),
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
