"""Malformed calls of causal_conv1d."""

from __future__ import annotations

from malformed import Call, ints, refused
from malformed.rules import FLOATS, dtype, offsets, option, rank
from torch import zeros


def _packed(call: Call) -> None:
    """Two packed sequences of 9 tokens."""
    call["x"] = call["x"].flatten(0, 1)


OR_WIDE = "must have the dtype of x, float32, or float32"

# Edits of the first sample: x [2, 9, 20], weight [20, 4], bias [20], initial_state [2, 20, 3].
CALLS = (
    rank("x", "[B, T, C]"),
    rank("x", "[T, C] (packed)", got=3, cu_seqlens=ints(0, 9)),
    *dtype("x", FLOATS, "int32", "int64"),
    refused("weight: must have shape [20, W]; got [19, 4]", weight=lambda t: t[1:]),
    refused("weight: must have shape [20, W]; got [20, 1, 4]", weight=lambda t: t[:, None]),
    refused("weight: must have a width of 1 to 8; got 0", weight=zeros(20, 0)),
    refused("weight: must have a width of 1 to 8; got 9", weight=zeros(20, 9)),
    *dtype("weight", OR_WIDE, "float16", "float64"),
    refused("weight: must be on the device of x, cpu; got meta", weight=lambda t: t.to("meta")),
    refused("bias: must have shape [20]; got [19]", bias=lambda t: t[1:]),
    *dtype("bias", OR_WIDE, "bfloat16"),
    refused("bias: must be on the device of x, cpu; got meta", bias=lambda t: t.to("meta")),
    *option("bias", "must be a tensor or None", 0.5),
    *option("activation", "must be None or 'silu'", "swish", "none"),
    refused(
        "initial_state: must have shape [2, 20, 3]; got [2, 20, 4]", initial_state=zeros(2, 20, 4)
    ),
    *dtype("initial_state", "must have the dtype of x, float32", "float16"),
    refused(
        "initial_state: must be on the device of x, cpu; got meta",
        initial_state=lambda t: t.to("meta"),
    ),
    *option("return_final_state", "must be a bool", 1),
    *offsets("cu_seqlens", _packed, [0, 9, 18], [0, 20, 18]),
)
