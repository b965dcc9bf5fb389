"""delta_attention_decode: the next tokens of each request, with its slot s of the states.

S_s <- decay S_s,   S_s <- S_s + k^T beta (v - k S_s),   out = scale q S_s
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._common import keep_states, requests_of
from .delta_attention import delta_attention


class _Prompt:
    """The first tokens (None: all) of some requests, as a call of delta_attention."""

    cu_seqlens, return_final_state = None, True

    def __init__(self, a: Any, slots: Tensor, requests: Tensor, tokens: int | None) -> None:
        self.q, self.k, self.v, self.beta, self.log_decay = (
            None if t is None else t[requests][:, :tokens]
            for t in (a.q, a.k, a.v, a.beta, a.log_decay)
        )
        self.scale, self.qk_l2norm = a.scale, a.qk_l2norm
        self.initial_state = a.state[slots[requests]]


def delta_attention_decode(a: Any) -> tuple[Tensor]:
    """q, k [B, S, Hk, D], v [B, S, Hv, Dv], beta [B, S, Hv], log_decay [B, S, Hv] | [B, S, Hv, D] |
    None: out [B, S, Hv, Dv]. state [slots, Hv, D, Dv] is updated in place.
    """
    active, slots = requests_of(a, a.q)

    def step(requests: Tensor, tokens: int | None) -> tuple[Tensor, Tensor]:
        return delta_attention(_Prompt(a, slots, requests, tokens))

    out = a.v.new_zeros(a.v.shape)
    out[active] = keep_states(a, active, slots, step)
    return (out,)
