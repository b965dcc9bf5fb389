"""linear_attention_decode: the next tokens of each request, with its slot s of the states.

S_s <- e^log_decay S_s + phi(k) (v, 1),    y = scale phi(q) S_s
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._common import divide, features_of, keep_states, recurrence, requests_of, values_of


def linear_attention_decode(a: Any) -> tuple[Tensor]:
    """q [B, S, H, D], k [B, S, Hk, D], v [B, S, Hk, Dv]: out [B, S, H, Dv]. state [slots, H, F, Dv
    (+ 1)] is updated in place.
    """
    active, slots = requests_of(a, a.q)

    def step(requests: Tensor, tokens: int | None) -> tuple[Tensor, Tensor]:
        q, k, v = (t[requests][:, :tokens] for t in (a.q, a.k, a.v))
        decay = a.log_decay
        if decay is not None and decay.dim() > 1:
            decay = decay[requests][:, :tokens]
        features = features_of(q, k, a.feature_map, a.scale)
        values = values_of(v, q, a.normalize)
        return recurrence(*features, values, decay, a.state[slots[requests]])

    out = a.q.new_zeros(*a.q.shape[:-1], a.v.shape[-1])
    out[active] = divide(keep_states(a, active, slots, step), a.normalize)[0].to(a.q.dtype)
    return (out,)
