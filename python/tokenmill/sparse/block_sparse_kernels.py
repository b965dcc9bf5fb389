"""Which calls of block_sparse_attention the sm_90a kernels take; launch_sm90.h and
launch_backward_sm90.h of csrc/sparse/block_sparse_attention have the same rules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._call.operator import record_of
from .._sm90 import Rules, float32

Arguments = record_of("block_sparse_attention")
HEAD_DIMS = (64, 128)
MIN_BLOCK = 64  # both block_q and block_k: rows of a warpgroup, and of a key tile


def unsupported_sm90(*lowered: Any, out: Tensor | None = None) -> list[str]:
    """Rules of the sm_90a forward that a call breaks."""
    a = Arguments(*lowered)
    rules = _rules_of_both_passes(a)
    if out is not None:
        rules.check_layout("out", out)
    return rules.broken


def unsupported_sm90_backward(*lowered: Any) -> list[str]:
    """Rules of the sm_90a backward that a call breaks. dout needs the layout of q."""
    a = Arguments(*lowered)
    rules = _rules_of_both_passes(a)
    rules.check(float32(a.softcap) <= 0, "softcap", "must be 0 in float32", a.softcap)
    return rules.broken


def _rules_of_both_passes(a: Any) -> Rules:
    rules = Rules()
    rules.check_heads(a.q, a.v, HEAD_DIMS)
    for name in ("block_q", "block_k"):
        size = getattr(a, name)
        rules.check(size >= MIN_BLOCK, name, f"must be {MIN_BLOCK} or more", size)
    rules.check(a.block_table is None, "block_table", "must be None", "a tensor")
    rules.check_scale(a)
    rules.check_tokens(a.q, a.k, a.cu_seqlens_q)
    rules.check_tiles(a.q, a.cu_seqlens_q)
    for name in ("q", "k", "v"):
        rules.check_layout(name, getattr(a, name))
    return rules
