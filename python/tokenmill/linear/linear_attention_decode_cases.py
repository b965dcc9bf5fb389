"""Samples and malformed calls of linear_attention_decode."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Malformed, Sample
from .linear_attention_cases import Arguments, draw_state


def _sample(
    b: int = 3,
    s: int = 1,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
    slots: tuple[int, ...] | None = None,
    decay: str | None = "head",
    feature_map: str = "identity",
    normalize: bool = False,
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        q, k, v = (
            torch.randn(b, s, heads, size, generator=g).to(dtype)
            for heads, size in ((h, d), (hk, d), (hk, dv))
        )
        kwargs: dict[str, Any] = {"feature_map": feature_map, "normalize": normalize}
        wide = torch.promote_types(dtype, torch.float32)
        if decay is not None:
            shape = (h,) if decay == "head" else (b, s, h)
            kwargs["log_decay"] = -torch.rand(shape, generator=g).to(wide)
        count = b
        if slots is not None:
            kwargs["state_indices"] = torch.tensor(slots, dtype=torch.int32)
            count = 5
        state = draw_state((count, h, d, dv), feature_map, normalize, dtype, g)
        return (q, k, v, state), kwargs

    return make


def _set(index: int, change: Any) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        args[index] = change(args[index])

    return edit


def _slots(*found: int, dtype: torch.dtype = torch.int32) -> Any:
    def edit(args: list[Any], kwargs: dict[str, Any]) -> None:
        kwargs["state_indices"] = torch.tensor(found, dtype=dtype)

    return edit


def _two_slots(args: list[Any], kwargs: dict[str, Any]) -> None:
    args[3] = args[3][:2]
    del kwargs["state_indices"]


SAMPLES = (
    Sample("slots", _sample(slots=(4, -1, 1))),
    Sample("in order", _sample(hk=4, d=24, dv=40, decay=None)),
    Sample(
        "several tokens",
        _sample(s=5, hk=1, slots=(0, 3, 2), decay="token", feature_map="elu1", normalize=True),
    ),
    Sample("silu", _sample(s=2, d=20, dv=9, feature_map="silu", decay="token")),
    Sample("relu", _sample(b=1, h=3, hk=1, d=7, dv=5, feature_map="relu")),
    Sample("taylor2", _sample(d=16, dv=20, slots=(2, 1, 0), feature_map="taylor2")),
    Sample(
        "taylor2, normalized",
        _sample(s=3, d=9, dv=16, feature_map="taylor2", normalize=True, decay="token"),
    ),
    Sample("wide heads", _sample(b=1, h=2, hk=1, d=200, dv=136)),
    Sample("all skipped", _sample(slots=(-1, -1, -1))),
    Sample("no tokens", _sample(s=0)),
    Sample("no requests", _sample(b=0, slots=())),
)


MALFORMED = (
    Malformed("rank", "q: must have 4 dimensions [B, S, H, D]; got 3", _set(0, lambda q: q[0])),
    Malformed(
        "lengths differ",
        "k: must have the length of q, 1; got 0",
        lambda a, k: a.__setitem__(slice(1, 3), [t[:, 1:] for t in a[1:3]]),
    ),
    Malformed(
        "state rank",
        "state: must have shape [slots, 4, 32, 32]; got [4, 32, 32]",
        _set(3, lambda s: s[0]),
    ),
    Malformed(
        "state shape",
        "state: must have shape [slots, 4, 32, 32]; got [5, 4, 32, 31]",
        _set(3, lambda s: s[..., 1:]),
    ),
    Malformed("state dtype", "state: must be float32; got float16", _set(3, lambda s: s.half())),
    Malformed(
        "state layout",
        "state: must have the rows of a head without gaps; strides; got [4096, 1024, 1, ",
        _set(3, lambda s: s.transpose(-1, -2)),
    ),
    Malformed(
        "expanded state",
        "state: must have each element at an address of its own; strides; got [0, 1024, ",
        _set(3, lambda s: s[:1].expand(5, -1, -1, -1)),
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
        lambda a, k: k.update(log_decay=torch.zeros(3, 4)),
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
        lambda a, k: k.update(log_decay=torch.tensor([-1.0, 0.0, 1.0, 2.0])),
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
