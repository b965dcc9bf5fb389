"""merge_attention_states: attention to all keys, from attention to parts n of them.

lse = log sum_n e^lse_n,    out = sum_n e^(lse_n - lse) out_n;    without lse: out = sum_n out_n
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import NEG_INF


def merge_attention_states(outs: Tensor, lses: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(outs.dtype, torch.float32)
    if lses is None:
        return outs.to(wide).sum(0).to(outs.dtype), outs.new_empty(0, dtype=wide)
    row_max = lses.detach().amax(0)
    row_max = torch.where(row_max == NEG_INF, 0.0, row_max)
    e = torch.exp(lses - row_max)
    total = e.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, NEG_INF, row_max + torch.log(total))
    weight = (e / total).transpose(-1, -2).unsqueeze(-1)  # [n, ..., H, S] -> [n, ..., S, H, 1]
    # An empty part has weight 0, whatever its out contains.
    return (torch.where(weight == 0, 0.0, outs.to(wide)) * weight).sum(0).to(outs.dtype), lse
