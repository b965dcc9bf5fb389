"""landmark_attention: a block of keys is weighted by its last token, its landmark. For query i, of
block c, with z_j = scale q_i . k_j and the logit l_b of the landmark of block b

    w_j = e^z_j / Z                            j of block c, j <= i
    w_j = e^l_b / Z  e^z_j / sum_m e^z_m       j and m of a block b < c

where j and m exclude landmarks, and Z makes the weights add up to 1. The weight of a block whose
logits are all -inf is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense._common import NEG_INF, expand_heads, scores, softmax, weighted_sum


def landmark_attention(a: Any, *, upcast: bool = True) -> tuple[Tensor, Tensor]:
    """out [B, S, H, Dv] and lse [B, H, S] of q [B, S, H, D] over k and v [B, S, Hk, ...]."""
    tokens, device = a.q.shape[1], a.q.device
    block = min(a.block, tokens + 1)
    blocks = -(-tokens // block)
    z = scores(a.q, a.k, a.scale, 0.0, None, None, None, 0.0, upcast)
    padded = torch.nn.functional.pad(z, (0, blocks * block - tokens), value=NEG_INF)
    z = padded.unflatten(-1, (blocks, block))  # [B, H, S, blocks, block]
    i = torch.arange(tokens, device=device)[:, None, None]
    j = torch.arange(blocks * block, device=device).view(blocks, block)
    ordinary = torch.arange(block, device=device) < block - 1
    earlier = j[:, -1:] < i // block * block  # earlier than the query's block: [S, blocks, 1]
    own = ordinary & ~earlier & (j <= i)
    inner, _ = softmax(z, ordinary & earlier, None)
    logits = torch.cat([z.flatten(-2), z[..., -1]], -1)
    seen = torch.cat([own.flatten(-2), earlier[..., 0]], -1)
    p, lse = softmax(logits, seen, None)
    within, gates = p.split((blocks * block, blocks), -1)
    p = (within + (gates[..., None] * inner).flatten(-2))[..., :tokens]
    out = weighted_sum(p, expand_heads(a.v, a.q.shape[2]).to(p.dtype)).to(a.q.dtype)
    return out, lse.to(torch.promote_types(a.q.dtype, torch.float32))
