"""Lowering rules from public functions to schemas, shared by several operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._check import as_number, check_tensor
from ._other_names import refuse


def take_options(function: Any, given: dict[str, Any]) -> tuple[Tensor | None, str | None]:
    """Takes out and backend from the keywords of a call of a public function, and refuses keywords
    that the function does not declare.
    """
    if not given.keys() <= function.keywords:
        refuse(function, {name: x for name, x in given.items() if name not in function.keywords})
    out, backend = given.pop("out", None), given.pop("backend", None)
    if out is not None:
        check_tensor(function.__name__, "out", out, optional=True)
    return out, backend


def scale_or_default(op: str, scale: float | None, q: Tensor) -> float:
    """scale, with 1 / sqrt(D) for None."""
    if scale is None:
        return 1.0 / math.sqrt(int(q.size(-1)) or 1) if q.dim() else 1.0
    return as_number(op, "scale", scale)


def widen(t: Tensor, q: Tensor) -> Tensor:
    """A small tensor in float32, or in float64 with a float64 q."""
    if not t.is_floating_point():
        return t
    return t.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def widen_fields(fields: dict[str, Any], q: Tensor, *names: str) -> None:
    """Widens the named arguments of a call that are given."""
    for name in names:
        if fields[name] is not None:
            fields[name] = widen(fields[name], q)
