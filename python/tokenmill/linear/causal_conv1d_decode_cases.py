"""Sample calls of causal_conv1d_decode."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample
from .causal_conv1d_cases import Arguments


def _sample(
    b: int = 3,
    t: int | None = None,
    c: int = 20,
    w: int = 4,
    columns: int = 3,
    slots: tuple[int, ...] | None = None,
    accepted: tuple[int, ...] | None = None,
    bias: bool = True,
    wide: bool = False,
    **options: Any,
) -> Any:
    """t: None for x [B, C]. wide: the filter is float32 whatever the dtype of x."""

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        kwargs = dict(options)
        count = b
        if slots is not None:
            kwargs["state_indices"] = torch.tensor(slots, dtype=torch.int32)
            count = 5
        if accepted is not None:
            kwargs["accepted"] = torch.tensor(accepted, dtype=torch.int32)
        filters = torch.promote_types(dtype, torch.float32) if wide else dtype
        lead = (b,) if t is None else (b, t)
        x = torch.randn(*lead, c, generator=g).to(dtype)
        state = torch.randn(count, c, columns, generator=g).to(dtype)
        weight = (torch.randn(c, w, generator=g) / w**0.5).to(filters)
        biases = torch.randn(c, generator=g).to(filters) if bias else None
        return (x, state, weight, biases), kwargs

    return make


SAMPLES = (
    Sample("slots", _sample(slots=(4, -1, 1), activation="silu")),
    Sample("a column more", _sample(columns=4, activation="silu", bias=False)),
    Sample("several tokens", _sample(t=6, slots=(0, 3, 2))),
    Sample("a token of a sequence", _sample(t=1, columns=7, w=3, c=33)),
    Sample("drafts", _sample(t=5, columns=4, slots=(0, 3, 2), accepted=(0, 2, 5))),
    Sample("a draft", _sample(b=1, accepted=(0,), activation="silu")),
    Sample("one tap", _sample(w=1, columns=0, activation="silu")),
    Sample("eight taps", _sample(w=8, columns=8, t=3, wide=True, slots=(1, 0, 4))),
    Sample("wide", _sample(b=1, c=600, activation="silu")),
    Sample("all skipped", _sample(slots=(-1, -1, -1))),
    Sample("no tokens", _sample(t=0)),
    Sample("no requests", _sample(b=0, slots=())),
)
