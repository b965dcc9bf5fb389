"""Sample calls of local_pool."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample


def _sample(
    shape: tuple[int, ...], kernel: int | tuple[int, int], *, masked: float = 0.0, **options: Any
) -> Any:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(options)
        change = given.pop("change", None)
        x = torch.randn(shape, generator=g).to(dtype)
        if masked:
            given["mask"] = torch.rand(shape[:-1], generator=g) >= masked
        return (change(x) if change else x, kernel), given

    return make


SAMPLES = (
    Sample("mean minus input", _sample((2, 5, 6, 16), 3, subtract_input=True)),
    Sample("maximum", _sample((2, 1, 11, 16), (1, 3), mode="max", masked=0.3)),
    Sample(
        "mean of some",
        _sample((2, 6, 5, 7), (3, 5), dilation=(2, 1), masked=0.6, subtract_input=True),
    ),
    Sample(
        "maximum of some",
        _sample(
            (1, 4, 7, 9),
            (1, 5),
            dilation=(1, 2),
            mode="max",
            masked=0.7,
            subtract_input=True,
        ),
    ),
    Sample(
        "the token itself",
        _sample((1, 2, 6, 10), 3, dilation=0, masked=0.3, count_include_pad=True),
    ),
    Sample(
        "strided",
        _sample((1, 6, 7, 21), 5, count_include_pad=True, change=lambda x: x[:, 1:, 2:, 4:]),
    ),
    Sample("no tokens", _sample((2, 0, 4, 8), 3)),
)
