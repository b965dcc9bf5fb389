"""Copies arguments whose last dimension is not contiguous, before an operator runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._check import fail
from .spec import OpSpec

JAGGED = "must be nested with layout=torch.jagged, or packed with cu_seqlens"


def strided(spec: OpSpec, lowered: tuple[Any, ...]) -> dict[str, int]:
    """The arguments that a call copies because their last dimension is not contiguous, with their
    indices in the lowered list.
    """
    found = {}
    for name in spec.copied:
        at = spec.forward.arguments.index(name)
        t = lowered[at]
        if t.is_nested:
            fail(spec.name, name, f"{JAGGED}; layout", t.layout)
        if t.dim() > 0 and not t.is_contiguous() and t.stride(-1) != 1:
            found[name] = at
    return found


def with_rows(
    spec: OpSpec, lowered: tuple[Any, ...], copy: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Any, ...]:
    """The lowered call with copies of the arguments that need them."""
    places = [*strided(spec, lowered).values()]
    if not places:
        return lowered
    return tuple(copy(t) if at in places else t for at, t in enumerate(lowered))


def empty_like(t: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the same shape, without its data."""
    empty = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    return empty.requires_grad_(t.requires_grad)
