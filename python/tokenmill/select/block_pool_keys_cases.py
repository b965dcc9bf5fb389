"""Sample calls of block_pool_keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Sample


def _ints(*values: int) -> Any:
    return lambda g: torch.tensor(values, dtype=torch.int32)


def _table(*rows: list[int]) -> Any:
    return lambda g: torch.tensor(rows, dtype=torch.int32)


def _infinite(k: Tensor) -> Tensor:
    k[1, 7, 1, 2] = float("inf")
    k[1, 8, 0, 3] = -float("inf")
    return k


def _sample(shape: tuple[int, ...], block: int, change: Any = None, **options: Any) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        k = torch.randn(shape, generator=g)
        if change:
            k = change(k)
        given = {n: v(g) if callable(v) else v for n, v in options.items()}
        return (k.to(dtype), block), given

    return make


_PAGES = _table([4, 1, -1], [0, 3, 2])


SAMPLES = (
    Sample("mean", _sample((2, 50, 2, 16), 16)),
    Sample("lengths", _sample((4, 40, 2, 24), 8, lengths=_ints(33, 0, -2, 99))),
    Sample("minmax", _sample((2, 35, 3, 64), 16, mode="minmax")),
    Sample("max", _sample((2, 20, 1, 130), 7, mode="max", lengths=_ints(20, 9))),
    Sample("infinite", _sample((2, 12, 2, 8), 4, _infinite, mode="minmax")),
    Sample(
        "paged",
        _sample((5, 8, 2, 16), 6, mode="minmax", lengths=_ints(11, 24), block_table=_PAGES),
    ),
    Sample("pages of one token", _sample((9, 1, 2, 16), 2, block_table=_table([8, 0, 3]))),
    Sample("one block", _sample((1, 9, 2, 5), 100, mode="minmax")),
    Sample("no tokens", _sample((2, 0, 2, 8), 4)),
    Sample("no requests", _sample((0, 9, 2, 8), 4, mode="max")),
)
