"""Malformed calls of attention_column_scores."""

from __future__ import annotations

from malformed import refused
from malformed.rules import keys, lengths, option, queries, scale

# Edits of the first sample: q [2, 70, 4, 32], k [2, 70, 2, 32], lse [2, 4, 70].
CALLS = (
    *queries([2, 70, 4, 32]),
    *keys([2, 70, 4, 32], [2, 70, 2, 32]),
    refused("lse: must have shape [2, 4, 70]; got [2, 4, 69]", lse=lambda t: t[..., 1:]),
    refused("lse: must not be given with gumbel_tau; got [2, 4, 70]", gumbel_tau=1.0, seed=1),
    *option("gumbel_tau", "must be positive and finite", 0.0, seed=1),
    *option("seed", "must be an integer", None, gumbel_tau=1.0),
    *option("seed", "requires gumbel_tau", 5),
    *option("seed", "must be 0 to 2^63 - 1", -1, gumbel_tau=1.0, lse=None),
    *scale(),
    *option("reduce", "must be 'sum', 'mean' or 'visible_mean'", "max"),
    *option("head_reduce", "must be 'none', 'group_mean' or 'group_max'", "mean"),
    *option("window_queries", "must be at least 1", 0),
    *lengths("seqlens_k", 2, 70),
    *lengths("seqlens_q", 2, 70),
)
