"""gather_fuse: prefix, x[keep], and one token sum_r w_r x_r over the rest r, with normalize divided
by sum_r w_r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gather_tokens import rows_at


def gather_fuse(a: Any) -> tuple[Tensor, Tensor]:
    """x [B, prefix + N, C], keep [B, K], rest [B, R], weight [B, N]: out [B, prefix + K + 1, C] and
    the sum of weights [B].
    """
    patches = a.x[:, a.prefix :]
    kept, fused = rows_at(patches, a.keep), rows_at(patches, a.rest)
    w = rows_at(a.weight[..., None], a.rest)
    total = w.sum(1)
    f = (w * fused).sum(1)
    if a.normalize:
        empty = total == 0
        f = torch.where(empty, 0.0, f / torch.where(empty, 1.0, total))
    out = torch.cat((a.x[:, : a.prefix], kept, f[:, None].to(a.x.dtype)), 1)
    return out, total[:, 0]
