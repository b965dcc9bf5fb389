"""Sample calls of linear_attention_decode."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample
from .linear_attention_cases import Arguments, draw_state


def _sample(
    b: int = 3,
    s: int = 1,
    h: int = 4,
    hk: int = 2,
    d: int = 32,
    dv: int = 32,
    slots: tuple[int, ...] | None = None,
    accepted: tuple[int, ...] | None = None,
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
            shape = {"head": (h,), "token": (b, s, h), "channel": (b, s, h, d)}[decay]
            kwargs["log_decay"] = -torch.rand(shape, generator=g).to(wide)
        count = b
        if slots is not None:
            kwargs["state_indices"] = torch.tensor(slots, dtype=torch.int32)
            count = 5
        if accepted is not None:
            kwargs["accepted"] = torch.tensor(accepted, dtype=torch.int32)
        state = draw_state((count, h, d, dv), feature_map, normalize, dtype, g)
        return (q, k, v, state), kwargs

    return make


SAMPLES = (
    Sample("slots", _sample(slots=(4, -1, 1))),
    Sample("in order", _sample(hk=4, d=24, dv=40, decay=None)),
    Sample(
        "several tokens",
        _sample(s=5, hk=1, slots=(0, 3, 2), decay="token", feature_map="elu1", normalize=True),
    ),
    Sample("per channel", _sample(s=3, d=20, dv=9, slots=(3, -1, 1), decay="channel")),
    Sample("drafts", _sample(s=4, slots=(4, 0, 3), accepted=(0, 2, 4), decay="token")),
    Sample("a draft", _sample(b=1, d=24, dv=9, accepted=(0,), decay="channel")),
    Sample(
        "drafts, normalized",
        _sample(b=2, s=3, d=9, accepted=(1, 0), feature_map="taylor2", normalize=True),
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
