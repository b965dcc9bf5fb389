"""Sample calls of titans_memory."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
GATES = ("alpha", "eta", "theta")


def _sample(
    b: int = 2,
    s: int = 33,
    h: int = 2,
    d: int = 16,
    dv: int = 16,
    lengths: tuple[int, ...] | None = None,
    gates: tuple[float, float, float] | None = None,
    state: bool = False,
    **options: Any,
) -> Any:
    """lengths packs sequences; gates are equal for all tokens."""

    def make(dtype: torch.dtype, g: torch.Generator) -> Arguments:
        wide = torch.promote_types(dtype, torch.float32)
        n, lead = b, [b, s]
        kwargs = dict(options)
        if lengths is not None:
            n, lead = len(lengths), [sum(lengths)]
            kwargs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        q, k, v = (
            (torch.randn(*lead, h, size, generator=g) * size**-0.5).to(dtype) for size in (d, d, dv)
        )
        # The steps of a chunk add up; larger gates would diverge.
        maximum = (0.2, 0.9, 0.5)
        for name, bound, value in zip(GATES, maximum, gates or (None, None, None), strict=True):
            drawn = torch.rand(*lead, h, generator=g) * bound
            kwargs[name] = (drawn if value is None else torch.full_like(drawn, value)).to(wide)
        if state:
            kwargs["initial_state"] = tuple(
                torch.randn(n, h, d, dv, generator=g).to(wide) for _ in range(2)
            )
            kwargs["return_final_state"] = True
        return (q, k, v), kwargs

    return make


SAMPLES = (
    Sample("chunks", _sample(chunk_size=10)),
    Sample("states", _sample(b=1, s=70, d=24, dv=40, state=True)),
    Sample("long chunks", _sample(b=1, s=150, h=1, chunk_size=100, state=True)),
    Sample("chunks of one token", _sample(b=1, s=9, chunk_size=1, state=True)),
    Sample("everything forgotten", _sample(s=12, gates=(1, 1, 0.3), chunk_size=5, state=True)),
    Sample("nothing forgotten", _sample(s=12, gates=(0, 0, 0), chunk_size=5, state=True)),
    Sample("gates beyond 1", _sample(s=7, gates=(-0.2, -1.1, -0.3), state=True)),
    Sample("packed", _sample(lengths=(5, 0, 40, 1), d=20, dv=12, chunk_size=16, state=True)),
    Sample("wide heads", _sample(b=1, s=18, h=1, d=200, dv=136, chunk_size=12, state=True)),
    Sample("narrow heads", _sample(h=3, d=1, dv=3)),
    Sample("one token", _sample(s=1, state=True)),
    Sample("no tokens", _sample(s=0, state=True)),
    Sample("packed, no tokens", _sample(lengths=(0, 0), state=True)),
    Sample("no sequences", _sample(lengths=(), return_final_state=True)),
)
