"""Copies arguments whose last dimension is not contiguous, before an operator runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .._check import fail
from .spec import OpSpec

JAGGED = "must be nested with layout=torch.jagged, or packed with cu_seqlens"


def strided(spec: OpSpec, given: Mapping[str, Any]) -> list[str]:
    """The arguments that a call copies because their last dimension is not contiguous."""
    found = []
    for name in spec.copied:
        t = given[name]
        if t.is_nested:
            fail(spec.name, name, f"{JAGGED}; layout", t.layout)
        if t.dim() > 0 and not t.is_contiguous() and t.stride(-1) != 1:
            found.append(name)
    return found


def with_rows(
    spec: OpSpec, lowered: tuple[Any, ...], copy: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Any, ...]:
    """The lowered call with copies of the arguments that need them."""
    given = spec.forward.named(lowered, {})
    copied = strided(spec, given)
    if not copied:
        return lowered
    return tuple(copy(t) if name in copied else t for name, t in given.items())


def empty_like(t: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the same shape, without its data."""
    empty = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    return empty.requires_grad_(t.requires_grad)
