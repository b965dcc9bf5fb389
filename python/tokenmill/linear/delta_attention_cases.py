"""Sample calls of delta_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid, normalize

from ..registry import Sample

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def sample(
    b: int = 1,
    s: int = 33,
    h: int = 2,
    hk: int = 1,
    d: int = 32,
    dv: int = 32,
    lengths: tuple[int, ...] | None = None,
    decay: str | float | None = "head",
    beta: float | None = None,
    state: bool = False,
    **options: Any,
) -> Any:
    """decay: per "head" or per "channel", a number of all tokens, or None. lengths packs
    sequences.
    """

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        wide = torch.promote_types(dtype, torch.float32)
        n, lead = b, [b, s]
        kwargs = dict(options)
        if lengths is not None:
            n, lead = len(lengths), [sum(lengths)]
            kwargs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        q, k, v = (
            torch.randn(*lead, heads, size, generator=g)
            for heads, size in ((hk, d), (hk, d), (h, dv))
        )
        if not options.get("qk_l2norm"):
            k = normalize(k, dim=-1)  # longer keys diverge
        drawn = torch.rand(*lead, h, generator=g)
        betas = (drawn if beta is None else torch.full_like(drawn, beta)).to(wide)
        if isinstance(decay, str):
            shape = (*lead, h, d) if decay == "channel" else (*lead, h)
            kwargs["log_decay"] = logsigmoid(torch.randn(shape, generator=g) + 2).to(wide)
        elif decay is not None:
            kwargs["log_decay"] = torch.full((*lead, h), decay, dtype=wide)
        if state:
            kwargs["initial_state"] = torch.randn(n, h, d, dv, generator=g).to(wide)
            kwargs["return_final_state"] = True
        return (*(t.to(dtype) for t in (q, k, v)), betas), kwargs

    return make


SAMPLES = (
    Sample("gated", sample(b=2)),
    Sample("per channel", sample(s=20, d=24, dv=40, decay="channel", state=True)),
    Sample("no decay", sample(s=70, h=1, decay=None, state=True)),
    Sample("normalized", sample(s=130, h=1, state=True, qk_l2norm=True)),
    Sample(
        "normalized, per channel", sample(s=66, h=1, decay="channel", qk_l2norm=True, scale=0.5)
    ),
    Sample("steep", sample(s=67, h=1, decay=-30.0, state=True)),
    Sample("beta of 2", sample(s=35, d=8, dv=16, beta=2.0, state=True)),
    Sample("beta of 0", sample(s=20, beta=0.0, state=True)),
    Sample("packed", sample(lengths=(5, 0, 66, 1), h=1, d=20, dv=12, state=True)),
    Sample("packed, per channel", sample(lengths=(33, 0, 3), decay="channel", state=True)),
    Sample("wide heads", sample(s=18, d=200, dv=136, state=True)),
    Sample("narrow heads", sample(s=20, h=3, d=1, dv=3, decay="channel")),
    Sample("one token", sample(s=1, state=True)),
    Sample("no tokens", sample(s=0, state=True)),
    Sample("packed, no tokens", sample(lengths=(0, 0), state=True)),
    Sample("no sequences", sample(lengths=(), return_final_state=True)),
)
