"""Sample calls of block_pool_keys_update."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample
from .block_pool_keys import SPEC as POOL
from .block_pool_keys_cases import _PAGES, _ints, _sample


def _update_sample(shape: tuple[int, ...], block: int, **options: Any) -> Any:
    draw = _sample(shape, block, **options)

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (k, _), given = draw(dtype, g)
        pool = {name: value for name, value in given.items() if name != "start"}
        like = POOL.forward.fake(POOL.record(k, block, **pool))
        pooled = torch.randn(like.shape, generator=g)
        return (k, pooled.to(dtype), block), given

    return make


SAMPLES = (
    Sample("append", _update_sample((2, 50, 2, 16), 16, start=_ints(30, 47))),
    Sample(
        "some requests",
        _update_sample(
            (4, 40, 2, 24),
            8,
            mode="max",
            start=_ints(15, 9, -3, 40),
            lengths=_ints(16, 9, 3, 99),
        ),
    ),
    Sample(
        "many blocks",
        _update_sample((2, 70, 1, 64), 3, mode="minmax", start=_ints(2, 33)),
    ),
    Sample(
        "paged",
        _update_sample(
            (5, 8, 2, 16),
            6,
            mode="minmax",
            start=_ints(10, 3),
            lengths=_ints(11, 24),
            block_table=_PAGES,
        ),
    ),
    Sample("no tokens", _update_sample((2, 0, 2, 8), 4, start=_ints(0, 0))),
)
