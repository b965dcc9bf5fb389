"""What the causal convolutions share: the activation, and the work of a call."""

from __future__ import annotations

import math
from typing import Any

from .._check import fail

ACTIVATIONS = "must be None or 'silu'"


def lower_activation(op: str, activation: Any) -> str:
    """The activation as the schema names it."""
    if activation is None:
        return "none"
    if not isinstance(activation, str) or activation != "silu":
        fail(op, "activation", ACTIVATIONS, activation)
    return "silu"


def flops(a: Any) -> float:
    """Operations of the taps of each element."""
    return 2.0 * math.prod(a.x.shape) * a.weight.shape[1]
