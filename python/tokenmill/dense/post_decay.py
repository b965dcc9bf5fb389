"""The post_decay of attention: weights that fade with the distance after they are normalised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._check import check
from .._lowering import widen
from ..masks import Decay2d, Grid, decay2d
from .attention_rules import OP, check_attention
from .terms import share_of

# In place of a smaller decay, whose logarithm would be infinite: what it leaves is below rounding.
LEAST_GAMMA = 1e-20


def decayed_attention(
    run: Callable[[tuple[Any, ...]], tuple[Tensor, Tensor]],
    lower: Callable[..., tuple[Any, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay2d,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """out, and the lse of the weights before they fade. With d the distance, the weights
    e^(z - lse) gamma^d are those of the logits z + d log gamma, times the share that the sum of
    these has in e^lse."""
    rule = "must be a tokenmill.masks.decay2d"
    ok = isinstance(decay, Decay2d) and isinstance(decay.grid, Grid)
    check(ok, OP, "post_decay", rule, decay)
    kind = options["kind"]
    check(kind == "softmax", OP, "post_decay", "needs kind 'softmax', not", kind)
    for name in ("alibi_slopes", "alibi_grid", "cu_seqlens_q", "cu_seqlens_k"):
        check(options[name] is None, OP, name, "must be None with post_decay", options[name])
    plain = lower(q, k, v, **options)
    decay = decay2d(decay.gamma, *decay.grid)  # a record may have been made by hand
    gamma = widen(decay.gamma, q)
    gamma = gamma + (LEAST_GAMMA - gamma.detach()).clamp(min=0)  # its derivative stays 1
    slopes = -gamma.log()
    faded = lower(q, k, v, **options | {"alibi_slopes": slopes, "alibi_grid": decay.grid})
    check_attention(*faded, float64=True)
    lse = run((*plain[:2], v[..., :1], *plain[3:]))[1]  # whatever the values are
    out, part = run(faded)
    return (out * share_of(part, lse)).to(q.dtype), lse
