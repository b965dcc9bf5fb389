"""Which calls of linear_attention the sm_90a kernel takes; launch_sm90.h of
csrc/linear/linear_attention has the same rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._call.operator import TorchOp
from .._sm90 import Rules

HEAD_DIMS = (128, 256)


def unsupported_sm90(op: TorchOp, *lowered: Any, out: Tensor | None = None) -> list[str]:
    """Rules of the sm_90a forward that a call breaks."""
    a = op.record(*lowered)
    rules = Rules()
    rules.check(a.q.dtype != torch.float32, "q", "must be float16 or bfloat16", a.q.dtype)
    for name, t in (("q", a.q), ("v", a.v)):
        columns = t.shape[-1]
        rules.check(columns in HEAD_DIMS, name, "must have head_dim 128 or 256", columns)
    plain = a.feature_map == "identity"
    rules.check(plain, "feature_map", "must be 'identity'", a.feature_map)
    rules.check(not a.normalize, "normalize", "must be False", a.normalize)
    rules.check_tokens(a.q, a.k, a.cu_seqlens)
    for name, t in (("q", a.q), ("k", a.k), ("v", a.v), ("out", out)):
        if t is not None:
            rules.check_layout(name, t)
    return rules.broken
