"""The post_decay of attention, by which normalised weights fade with the distance, as the slopes
that the operator takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._check import check
from .._lowering import widen
from ..masks import Decay2d, Grid, decay2d
from .attention_rules import OP

# In place of a smaller decay, whose logarithm would be infinite: what it leaves is below rounding.
LEAST_GAMMA = 1e-20


def lower_post_decay(decay: Decay2d, q: Tensor, **absent: Any) -> tuple[Tensor, Grid]:
    """Slopes -log gamma, and the grid that they are over. absent: arguments that it excludes."""
    rule = "must be a tokenmill.masks.decay2d"
    ok = isinstance(decay, Decay2d) and isinstance(decay.grid, Grid)
    check(ok, OP, "post_decay", rule, decay)
    for name, value in absent.items():
        check(value is None, OP, name, "must be None with post_decay", value)
    decay = decay2d(decay.gamma, *decay.grid)  # a record may have been made by hand
    gamma = widen(decay.gamma, q)
    gamma = gamma + (LEAST_GAMMA - gamma.detach()).clamp(min=0)  # its derivative stays 1
    return -gamma.log(), decay.grid
