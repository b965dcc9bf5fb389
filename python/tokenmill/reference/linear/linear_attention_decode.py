"""linear_attention_decode: the next tokens of each request, with its slot s of the states.

S_s <- e^log_decay S_s + phi(k) (v, 1),    y = scale phi(q) S_s
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import divide, features_of, recurrence, values_of


def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    state_indices: Tensor | None,
) -> tuple[Tensor]:
    """Updates state in place."""
    if state_indices is None:
        state_indices = torch.arange(q.shape[0], device=q.device)
    active = state_indices >= 0
    slots = state_indices[active].long()
    decay = log_decay[active] if log_decay is not None and log_decay.dim() > 1 else log_decay
    features = features_of(q[active], k[active], feature_map, scale)
    y, after = recurrence(*features, values_of(v[active], q, normalize), decay, state[slots])
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    out[active] = divide(y, normalize)[0].to(q.dtype)
    state[slots] = after
    return (out,)
