"""Malformed calls of block_pool_keys_update."""

from __future__ import annotations

from malformed import refused
from malformed.rules import expanded, same_dtype, shared, tensor
from malformed.select.block_pool_keys import COMMON

CALLS = (
    *COMMON,
    *tensor("start", "[2]", [1], "int32"),
    refused(
        "pooled: must have shape [2, 4, 2, 16]; got [2, 4, 2, 15]", pooled=lambda t: t[..., 1:]
    ),
    same_dtype("pooled", "k"),
    expanded("pooled", "[128, 0, ", pooled=lambda t: t[:, :1].expand(-1, 4, -1, -1)),
    shared("pooled", "k", [1600, 32, 16, 1], lambda call: call.update(pooled=call["k"][:, :4])),
)
