"""Malformed calls of attention_row_scores."""

from __future__ import annotations

from malformed import refused
from malformed.rules import lengths, option, scale
from torch import zeros

# Edits of the first sample: q_rows [2, 1, 3, 64], k [2, 197, 3, 64].
CALLS = (
    refused("q: must have 4 dimensions [B, S, H, D]; got 3", q_rows=lambda t: t[0]),
    refused("k: number of heads must divide that of q, 3 (GQA); got 2", k=lambda t: t[:, :, 1:]),
    refused("lse: must have shape [2, 3, 1]; got [2, 3]", lse=zeros(2, 3)),
    *scale(),
    *option("reduce", "must be 'none', 'sum', 'mean', 'max' or 'argmax'", "min"),
    *option("skip", "must be 0 to the number of keys, 197", 198),
    *lengths("seqlens_k", 2, 197, 1),
)
