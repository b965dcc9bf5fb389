"""Samples and malformed calls of mask_partition."""

from __future__ import annotations

from typing import Any

import torch

from .._edits import set_argument, set_options
from ..registry import Malformed, Sample


def _sample(batch: int, tokens: int, share: float, max_total: int | None = None) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = torch.rand(batch, tokens, generator=g) < share
        return (mask,), {} if max_total is None else {"max_total": max_total}

    return make


SAMPLES = (
    Sample("some", _sample(3, 67, 0.4, 150)),
    Sample("all that there may be", _sample(2, 300, 0.5)),
    Sample("one row", _sample(1, 1000, 0.01)),
    Sample("none", _sample(2, 9, 0.0, 0)),
    Sample("no tokens", _sample(3, 0, 0.5, 2)),
    Sample("no rows", _sample(0, 7, 0.5)),
)


MALFORMED = (
    Malformed(
        "rank",
        "mask: must have 2 dimensions [B, N]; got 1",
        set_argument(0, lambda t: t[0]),
    ),
    Malformed("dtype", "mask: must be bool; got int32", set_argument(0, lambda t: t.int())),
    Malformed(
        "layout",
        "mask: must have a contiguous last dimension",
        set_argument(0, lambda t: t.t()),
    ),
    Malformed(
        "negative total",
        "max_total: must be 0 to 2^31 - 1; got -1",
        set_options(max_total=-1),
    ),
    Malformed(
        "total",
        "max_total: must be at least the number of tokens taken, 201; got 150",
        set_argument(0, torch.ones_like),
        values=True,
    ),
)
