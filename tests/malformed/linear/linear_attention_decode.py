"""Malformed calls of linear_attention_decode."""

from __future__ import annotations

import torch
from malformed import ints, refused, refused_values
from malformed.rules import expanded, qkv, shared, sliced, tensor

# Edits of the first sample: q [3, 1, 4, 32], k and v [3, 1, 2, 32], state [5, 4, 32, 32].
CALLS = (
    *qkv([3, 1, 4, 32], [3, 1, 2, 32]),
    refused("k: must have the length of q, 1; got 0", sliced("k", "v", at=(slice(None), slice(0)))),
    *tensor("state", "[slots, 4, 32, 32]", [4, 32, 32], "float32", "float16"),
    refused(
        "state: must have shape [slots, 4, 32, 32]; got [5, 4, 32, 31]", state=lambda s: s[..., 1:]
    ),
    refused(
        "state: must have the rows of a head without gaps; strides; got [4096, 1024, 1, ",
        state=lambda s: s.transpose(-1, -2),
    ),
    expanded("state", "[0, 1024, ", state=lambda s: s[:1].expand(5, -1, -1, -1)),
    shared(
        "state",
        "v",
        [4096, 1024, 32, 1],
        lambda call: call.update(v=call["state"].flatten()[64:256].view(3, 1, 2, 32)),
    ),
    refused(
        "state: must have a slot for each sequence, 3, without state_indices; got 2",
        state=lambda s: s[:2],
        state_indices=None,
    ),
    *tensor("log_decay", "[4], [3, 1, 4] or [3, 1, 4, 32]", [3, 4]),
    refused(
        "feature_map: must be 'identity' with a log_decay per channel; got 'silu'",
        log_decay=torch.zeros(3, 1, 4, 32),
        feature_map="silu",
    ),
    *tensor("state_indices", "[3]", [2], "int32"),
    refused_values(
        "log_decay: must not be positive; largest; got 2",
        log_decay=torch.tensor([-1.0, 0.0, 1.0, 2.0]),
    ),
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
