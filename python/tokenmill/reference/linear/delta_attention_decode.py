"""delta_attention_decode: the next tokens of each request, with its slot s of the states.

S_s <- decay S_s,   S_s <- S_s + k^T beta (v - k S_s),   out = scale q S_s
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .delta_attention import delta_attention


class _Prompt:
    """The requests that are not skipped, as a call of delta_attention."""

    cu_seqlens, return_final_state = None, True

    def __init__(self, a: Any, active: Tensor, slots: Tensor) -> None:
        self.q, self.k, self.v, self.beta = (t[active] for t in (a.q, a.k, a.v, a.beta))
        self.log_decay = None if a.log_decay is None else a.log_decay[active]
        self.scale, self.qk_l2norm = a.scale, a.qk_l2norm
        self.initial_state = a.state[slots]


def delta_attention_decode(a: Any) -> tuple[Tensor]:
    """q, k [B, S, Hk, D], v [B, S, Hv, Dv], beta [B, S, Hv], log_decay [B, S, Hv] | [B, S, Hv, D] |
    None: out [B, S, Hv, Dv]. state [slots, Hv, D, Dv] is updated in place.
    """
    indices = a.state_indices
    if indices is None:
        indices = torch.arange(a.q.shape[0], device=a.q.device)
    active = indices >= 0
    slots = indices[active].long()
    out = a.v.new_zeros(a.v.shape)
    y, after = delta_attention(_Prompt(a, active, slots))
    out[active] = y
    a.state[slots] = after
    return (out,)
