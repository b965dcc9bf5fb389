"""query_similarity_gate: cos(sum_i q_i, sum_i q_ref_i) >= threshold, over all heads at once."""

from __future__ import annotations

import torch
from torch import Tensor


def query_similarity_gate(q: Tensor, q_ref: Tensor, threshold: float) -> tuple[Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    x, y = (t.sum(1, dtype=wide).flatten(1) for t in (q, q_ref))
    return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)) >= threshold,)
