"""additive_attention: scores of queries and keys, -inf for masked pairs.

u_ij = v . tanh(q_i + k_j), -inf for masked pairs
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import NEG_INF


def additive_attention(a: Any) -> tuple[Tensor, ...]:
    """q [B, T, A], k [B, N, A], v_weight [A], mask [B, N] or [B, T, N] -> scores [B, T, N]."""
    wide = torch.promote_types(a.q.dtype, torch.float32)
    v = a.v_weight.to(wide)
    x = a.q.to(wide).unsqueeze(2) + a.k.to(wide).unsqueeze(1)  # [B, T, N, A]
    if a.mask is None:
        return (torch.tanh(x) @ v,)
    visible = a.mask.unsqueeze(1) if a.mask.dim() == 2 else a.mask
    # A masked pair affects neither a score nor a gradient.
    x = torch.where(visible.unsqueeze(-1), x, 0.0)
    return (torch.where(visible, torch.tanh(x) @ v, NEG_INF),)
