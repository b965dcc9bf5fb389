"""Sample calls of delta_attention_decode."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample
from .delta_attention_cases import Arguments
from .delta_attention_cases import sample as sample_prompt


def _sample(
    b: int = 3,
    s: int = 1,
    slots: tuple[int, ...] | None = None,
    accepted: tuple[int, ...] | None = None,
    **options: Any,
) -> Any:
    """A sample of delta_attention that continues from states in slots."""
    prompt = sample_prompt(b=b, s=s, **options)

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        (q, k, v, beta), kwargs = prompt(dtype, g)
        count = b
        if slots is not None:
            kwargs["state_indices"] = torch.tensor(slots, dtype=torch.int32)
            count = 5
        if accepted is not None:
            kwargs["accepted"] = torch.tensor(accepted, dtype=torch.int32)
        state = torch.randn(count, v.shape[2], q.shape[3], v.shape[3], generator=g)
        return (q, k, v, beta, state.to(beta.dtype)), kwargs

    return make


SAMPLES = (
    Sample("slots", _sample(slots=(4, -1, 1))),
    Sample("per channel", _sample(d=24, dv=40, decay="channel", qk_l2norm=True)),
    Sample("no decay", _sample(h=1, decay=None, scale=0.5)),
    Sample("several tokens", _sample(s=5, h=4, hk=2, slots=(0, 3, 2), qk_l2norm=True)),
    Sample("drafts", _sample(s=4, h=4, hk=2, slots=(4, 0, 3), accepted=(0, 2, 4))),
    Sample("a draft", _sample(b=1, s=3, d=40, dv=24, decay="channel", accepted=(0,))),
    Sample("several tokens, per channel", _sample(b=2, s=3, d=9, dv=20, decay="channel")),
    Sample("steep", _sample(s=2, decay=-30.0)),
    Sample("beta of 2", _sample(s=4, d=8, dv=16, beta=2.0)),
    Sample("wide heads", _sample(b=1, s=2, d=200, dv=136)),
    Sample("narrow heads", _sample(h=3, d=1, dv=3, decay="channel")),
    Sample("all skipped", _sample(slots=(-1, -1, -1))),
    Sample("no tokens", _sample(s=0)),
    Sample("no requests", _sample(b=0, slots=())),
)
