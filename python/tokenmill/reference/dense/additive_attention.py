"""additive_attention: scores of queries and keys, -inf for masked pairs.

u_ij = v . tanh(q_i + k_j), -inf for masked pairs
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import NEG_INF


def additive_attention(
    q: Tensor, k: Tensor, v_weight: Tensor, mask: Tensor | None
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(q.dtype, torch.float32)
    x = q.to(wide).unsqueeze(2) + k.to(wide).unsqueeze(1)  # [B, T, N, A]
    if mask is None:
        return (torch.tanh(x) @ v_weight.to(wide),)
    visible = mask.unsqueeze(1) if mask.dim() == 2 else mask
    # A masked pair affects neither a score nor a gradient.
    x = torch.where(visible.unsqueeze(-1), x, 0.0)
    return (torch.where(visible, torch.tanh(x) @ v_weight.to(wide), NEG_INF),)
