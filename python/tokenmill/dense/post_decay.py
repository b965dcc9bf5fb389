"""Lowers post_decay (normalised weights that fade with the distance) to the slopes that the
operator takes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._check import check
from .._lowering import widen
from ..masks import Decay2d, Grid, decay2d
from .attention_rules import OP

# Replaces smaller decays, whose logarithm would be infinite; the weights left are below rounding.
MIN_GAMMA = 1e-20


def lower_post_decay(decay: Decay2d, q: Tensor, **absent: Any) -> tuple[Tensor, Grid]:
    """Slopes -log gamma and their grid. absent: arguments that post_decay excludes."""
    rule = "must be a tokenmill.masks.decay2d"
    ok = isinstance(decay, Decay2d) and isinstance(decay.grid, Grid)
    check(ok, OP, "post_decay", rule, decay)
    for name, value in absent.items():
        check(value is None, OP, name, "must be None with post_decay", value)
    decay = decay2d(decay.gamma, *decay.grid)  # the record may have been built by hand
    gamma = widen(decay.gamma, q)
    gamma = gamma + (MIN_GAMMA - gamma.detach()).clamp(min=0)  # keeps the derivative 1
    return -gamma.log(), decay.grid
