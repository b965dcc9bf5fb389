"""linear_attention_decode: the next tokens of each request, with its slot s of the states.

S_s <- e^log_decay S_s + phi(k) (v, 1),    y = scale phi(q) S_s
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import divide, features_of, recurrence, values_of


def linear_attention_decode(a: Any) -> tuple[Tensor]:
    """q [B, S, H, D], k [B, S, Hk, D], v [B, S, Hk, Dv]: out [B, S, H, Dv]. state [slots, H, F, Dv
    (+ 1)] is updated in place.
    """
    q, log_decay, state_indices = a.q, a.log_decay, a.state_indices
    if state_indices is None:
        state_indices = torch.arange(q.shape[0], device=q.device)
    active = state_indices >= 0
    slots = state_indices[active].long()
    decay = log_decay[active] if log_decay is not None and log_decay.dim() > 1 else log_decay
    features = features_of(q[active], a.k[active], a.feature_map, a.scale)
    values = values_of(a.v[active], q, a.normalize)
    y, after = recurrence(*features, values, decay, a.state[slots])
    out = q.new_zeros(*q.shape[:-1], a.v.shape[-1])
    out[active] = divide(y, a.normalize)[0].to(q.dtype)
    a.state[slots] = after
    return (out,)
