"""Malformed calls of query_similarity_gate."""

from __future__ import annotations

from malformed import refused
from malformed.rules import FLOATS, QUERIES, dtype, layout, rank, same_dtype

CALLS = (
    rank("q", QUERIES),
    *dtype("q", FLOATS, "int32"),
    same_dtype("q_ref", "q"),
    layout("q_ref"),
    refused(
        "q_ref: must have the B, H and D of q, [5, 4, 32]; got [5, 3, 32]",
        q_ref=lambda t: t[:, :, 1:],
    ),
)
