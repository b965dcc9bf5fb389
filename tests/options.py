"""Selects samples of an operator that cover its options pairwise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch

from tokenmill import registry
from tokenmill.registry import OpSpec, Sample


def kind(value: Any) -> Any:
    """Properties of an argument that code can see without reading its values: rank of a tensor,
    type and sign of a number, value of a switch."""
    if isinstance(value, torch.Tensor):
        return (
            "tensor",
            value.dim(),
            value.dtype.is_floating_point,
            value.itemsize,
            value.numel() == 0,
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        return type(value).__name__, (value > 0) - (value < 0)
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(map(kind, value))
    return value if isinstance(value, bool | str) else type(value).__name__


def pairs(spec: OpSpec, sample: Sample) -> Iterator[tuple]:
    args, kwargs = sample.make(torch.float32, torch.Generator().manual_seed(0))
    names = inspect.signature(spec.function).parameters
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    kinds = sorted(((name, kind(value)) for name, value in given.items()), key=repr)
    yield from combinations(kinds, 2)
    yield from ((k,) for k in kinds)


@functools.cache
def pairwise_samples(op: str) -> tuple[Sample, ...]:
    """Samples of an operator that cover each pair of options that any sample has: greedily, the
    first sample and then always the one with most uncovered pairs. For tests of behavior that
    depends only on the options of a call: Python code paths, contents of graphs."""
    spec = registry.get(op)
    left = {sample: set(pairs(spec, sample)) for sample in spec.samples}
    found: list[Sample] = []
    best = spec.samples[0]
    while left[best]:
        found.append(best)
        shown = frozenset(left[best])
        for others in left.values():
            others -= shown
        best = max(spec.samples, key=lambda sample: len(left[sample]))
    return tuple(found)
