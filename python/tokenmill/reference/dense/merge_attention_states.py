"""merge_attention_states: attention to all keys, from attention to parts n of them.

lse = log sum_n e^lse_n,    out = sum_n e^(lse_n - lse) out_n;    without lse: out = sum_n out_n
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import NEG_INF


def merge_attention_states(a: Any) -> tuple[Tensor, Tensor]:
    """outs [n, ..., S, H, D] and lses [n, ..., H, S] -> out [..., S, H, D], lse [..., H, S]."""
    wide = torch.promote_types(a.outs.dtype, torch.float32)
    if a.lses is None:
        return a.outs.to(wide).sum(0).to(a.outs.dtype), a.outs.new_empty(0, dtype=wide)
    row_max = a.lses.detach().amax(0)
    row_max = torch.where(row_max == NEG_INF, 0.0, row_max)
    e = torch.exp(a.lses - row_max)
    total = e.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, NEG_INF, row_max + torch.log(total))
    weight = (e / total).transpose(-1, -2).unsqueeze(-1)  # [n, ..., H, S] -> [n, ..., S, H, 1]
    # An empty part has weight 0, whatever its out contains.
    outs = torch.where(weight == 0, 0.0, a.outs.to(wide))
    return (outs * weight).sum(0).to(a.outs.dtype), lse
