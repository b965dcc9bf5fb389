"""Sample calls of transpose_block_list."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample
from .block_sparse_attention_cases import draw_lists, hostile_lists


def _sample(
    batch: int, heads: int, rows: int, entries: int, blocks: int, hostile: Any = None
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        indices, counts = draw_lists(batch, heads, rows, entries, blocks, g)
        if hostile:
            indices, counts = hostile(indices, counts, blocks, g)
        return (indices, counts, blocks), {}

    return make


SAMPLES = (
    Sample("lists", _sample(2, 3, 9, 5, 12)),
    Sample("long rows", _sample(1, 2, 70, 33, 40)),
    Sample("more blocks than entries", _sample(1, 1, 4, 3, 1000)),
    Sample("not to be trusted", _sample(2, 2, 11, 8, 20, hostile_lists)),
    Sample("one block", _sample(1, 1, 300, 1, 1)),
    Sample("no entries", _sample(1, 2, 4, 0, 5)),
    Sample("no rows", _sample(2, 1, 0, 3, 5)),
    Sample("no blocks", _sample(1, 1, 3, 2, 0)),
    Sample("no heads", _sample(0, 1, 3, 2, 4)),
)
