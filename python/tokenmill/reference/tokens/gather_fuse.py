"""gather_fuse: prefix, x[keep], and one token sum_r w_r x_r over the rest r, with normalize divided
by sum_r w_r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gather_tokens import gather_tokens


def gather_fuse(
    x: Tensor, keep: Tensor, rest: Tensor, weight: Tensor, prefix: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    patches = x[:, prefix:]
    (kept,), (fused,) = gather_tokens(patches, keep), gather_tokens(patches, rest)
    (w,) = gather_tokens(weight[..., None], rest)
    total = w.sum(1)
    f = (w * fused).sum(1)
    if normalize:
        empty = total == 0
        f = torch.where(empty, 0.0, f / torch.where(empty, 1.0, total))
    out = torch.cat((x[:, :prefix], kept, f[:, None].to(x.dtype)), 1)
    return out, total[:, 0]
