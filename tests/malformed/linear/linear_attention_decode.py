"""Malformed calls of linear_attention_decode."""

from __future__ import annotations

from typing import Any

import torch
from malformed import Malformed, set_argument, set_options


def _slots(*found: int, dtype: torch.dtype = torch.int32) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        kwargs["state_indices"] = torch.tensor(found, dtype=dtype)

    return edit


def _two_slots(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[3] = args[3][:2]
    del kwargs["state_indices"]


CALLS = (
    Malformed(
        "rank", "q: must have 4 dimensions [B, S, H, D]; got 3", set_argument(0, lambda q: q[0])
    ),
    Malformed(
        "lengths differ",
        "k: must have the length of q, 1; got 0",
        lambda a, k: a.__setitem__(slice(1, 3), [t[:, 1:] for t in a[1:3]]),
    ),
    Malformed(
        "state rank",
        "state: must have shape [slots, 4, 32, 32]; got [4, 32, 32]",
        set_argument(3, lambda s: s[0]),
    ),
    Malformed(
        "state shape",
        "state: must have shape [slots, 4, 32, 32]; got [5, 4, 32, 31]",
        set_argument(3, lambda s: s[..., 1:]),
    ),
    Malformed(
        "state dtype", "state: must be float32; got float16", set_argument(3, lambda s: s.half())
    ),
    Malformed(
        "state layout",
        "state: must have the rows of a head without gaps; strides; got [4096, 1024, 1, ",
        set_argument(3, lambda s: s.transpose(-1, -2)),
    ),
    Malformed(
        "expanded state",
        "state: must have each element at an address of its own; strides; got [0, 1024, ",
        set_argument(3, lambda s: s[:1].expand(5, -1, -1, -1)),
    ),
    Malformed(
        "state over v",
        "state: must not share memory with v; strides; got [4096, 1024, 32, 1]",
        lambda a, k: a.__setitem__(2, a[3].flatten()[64:256].view(3, 1, 2, 32)),
    ),
    Malformed(
        "too few slots",
        "state: must have a slot for each sequence, 3, without state_indices; got 2",
        _two_slots,
    ),
    Malformed(
        "log_decay shape",
        "log_decay: must have shape [4] or [3, 1, 4]; got [3, 4]",
        set_options(log_decay=torch.zeros(3, 4)),
    ),
    Malformed(
        "indices dtype",
        "state_indices: must be int32; got int64",
        _slots(0, 1, 2, dtype=torch.int64),
    ),
    Malformed("indices shape", "state_indices: must have shape [3]; got [2]", _slots(0, 1)),
    Malformed(
        "log_decay positive",
        "log_decay: must not be positive; largest; got 2",
        set_options(log_decay=torch.tensor([-1.0, 0.0, 1.0, 2.0])),
        values=True,
    ),
    Malformed(
        "slot out of range",
        "state_indices: must be -1 (skip) or a slot below 5; got 5",
        _slots(0, 5, 1),
        values=True,
    ),
    Malformed(
        "negative slot",
        "state_indices: must be -1 (skip) or a slot below 5; got -2",
        _slots(0, -2, 1),
        values=True,
    ),
    Malformed(
        "repeated slot",
        "state_indices: must not repeat a slot; got [1, 0, 1]",
        _slots(1, 0, 1),
        values=True,
    ),
)
