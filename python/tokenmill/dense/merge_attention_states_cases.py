"""Sample calls of merge_attention_states."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


def _sample(parts: int, shape: tuple[int, ...], with_lses: bool) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        outs = torch.randn(parts, *shape, generator=g).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        lse_shape = (parts, *shape[:-3], shape[-2], shape[-3])
        lses = torch.randn(lse_shape, generator=g).to(wide) if with_lses else None
        if lses is not None and parts > 1:
            lses[0, ..., :1] = float("-inf")
            lses[:, ..., -1:] = float("-inf")
        return (outs, lses), {}

    return make


SAMPLES = (
    Sample("four parts", _sample(4, (2, 9, 3, 40), True)),
    Sample("packed", _sample(3, (17, 2, 64), True)),
    Sample("sum", _sample(2, (1, 5, 2, 33), False)),
    Sample("one part", _sample(1, (1, 3, 1, 8), True)),
    Sample("no rows", _sample(2, (1, 0, 2, 8), True)),
)
