"""Sample calls of causal_conv1d."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _sample(
    b: int = 2,
    t: int = 9,
    c: int = 20,
    w: int = 4,
    lengths: tuple[int, ...] | None = None,
    bias: bool = True,
    state: bool = False,
    wide: bool = False,
    **options: Any,
) -> Any:
    """lengths packs sequences. wide: the filter is float32 whatever the dtype of x."""

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        n, lead = b, [b, t]
        kwargs = dict(options)
        if lengths is not None:
            n, lead = len(lengths), [sum(lengths)]
            kwargs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        filters = torch.promote_types(dtype, torch.float32) if wide else dtype
        x = torch.randn(*lead, c, generator=g).to(dtype)
        weight = (torch.randn(c, w, generator=g) / w**0.5).to(filters)
        biases = torch.randn(c, generator=g).to(filters) if bias else None
        if state:
            kwargs["initial_state"] = torch.randn(n, c, w - 1, generator=g).to(dtype)
            kwargs["return_final_state"] = True
        return (x, weight, biases), kwargs

    return make


SAMPLES = (
    Sample("silu", _sample(state=True, activation="silu")),
    Sample("no activation", _sample(t=70, w=3, bias=False)),
    Sample("two taps", _sample(w=2, c=33, state=True, activation="silu")),
    Sample("one tap", _sample(w=1, state=True)),
    Sample("eight taps", _sample(w=8, c=16, state=True, activation="silu", wide=True)),
    Sample("wide", _sample(b=1, t=5, c=300, bias=False, activation="silu")),
    Sample("a channel", _sample(c=1, activation="silu")),
    Sample("shorter than the filter", _sample(t=2, w=6, state=True)),
    Sample("packed", _sample(lengths=(5, 0, 66, 1, 2), activation="silu", state=True)),
    Sample("packed, no state", _sample(lengths=(2, 0, 3), w=4, return_final_state=True)),
    Sample("no tokens", _sample(t=0, state=True)),
    Sample("packed, no tokens", _sample(lengths=(0, 0), state=True)),
    Sample("no sequences", _sample(b=0, state=True)),
    Sample("packed, no sequences", _sample(lengths=(), return_final_state=True)),
)
