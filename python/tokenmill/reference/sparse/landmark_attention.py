"""landmark_attention: a block of keys is weighted by its last token, its landmark. For query i, of
block c, with z_j = scale q_i . k_j and the logit l_b of the landmark of block b

    w_j = e^z_j / Z                            j of block c, j <= i
    w_j = e^l_b / Z  e^z_j / sum_m e^z_m       j and m of a block b < c

where j and m exclude landmarks, and Z makes the weights add up to 1. The weight of a block whose
logits are all -inf is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dense._common import NEG_INF, expand_heads, scores, softmax, weighted_sum


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int, scale: float, *, upcast: bool = True
) -> tuple[Tensor, Tensor]:
    tokens, device = q.shape[1], q.device
    block = min(block, tokens + 1)
    blocks = -(-tokens // block)
    z = scores(q, k, scale, 0.0, None, None, None, 0.0, upcast)
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
    out = weighted_sum(p, expand_heads(v, q.shape[2]).to(p.dtype)).to(q.dtype)
    return out, lse.to(torch.promote_types(q.dtype, torch.float32))
