"""query_similarity_gate: cos(sum_i q_i, sum_i q_ref_i) >= threshold, over all heads at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def query_similarity_gate(a: Any) -> tuple[Tensor]:
    wide = torch.promote_types(a.q.dtype, torch.float32)
    x, y = (t.sum(1, dtype=wide).flatten(1) for t in (a.q, a.q_ref))
    return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)) >= a.threshold,)
