"""Malformed calls of reconstruct_tokens."""

from __future__ import annotations

from malformed import refused
from malformed.rules import FLOATS, TOKENS, dtype, layout, option, rank, same_batch, same_dtype

CALLS = (
    rank("features", TOKENS),
    *dtype("features", FLOATS, "int32"),
    layout("values"),
    same_dtype("centroids", "features"),
    same_batch("values", "features", 2),
    refused("features: must have 1 to 4096 channels; got 0", features=lambda t: t[..., :0]),
    refused(
        "centroids: must have the channels of features, 20; got 19", centroids=lambda t: t[..., 1:]
    ),
    refused("values: must have a row for each centroid, 21; got 20", values=lambda t: t[:, 1:]),
    *option("k", "must be 1 to 21, the number of centroids", 22),
    *option("tau", "must be finite and at least 0", -1.0),
    *option("norm", "must be 'l1' or 'l2'", "l3"),
)
