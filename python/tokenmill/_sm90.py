"""Which calls the sm_90a kernels take: rules shared by operators, as in calls.h, launch_sm90.h and
tensor_map.cu of csrc.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

MIN_TOKENS = 32  # queries in a tile of 64 or 128 rows, or a chunk of 64
MAX_TILES = 2**30  # tiles of a forward


class Rules:
    """The rules that a call breaks: "argument: rule; got value" each."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def check(self, holds: bool, argument: str, rule: str, value: object) -> None:
        if not holds:
            self.broken.append(f"{argument}: {rule}; got {value}")

    def check_heads(
        self, q: Tensor, v: Tensor, head_dims: tuple[int, ...], values: str = "v"
    ) -> None:
        columns = q.shape[-1]
        named = f"{', '.join(map(str, head_dims[:-1]))} or {head_dims[-1]}"
        self.check(q.dtype != torch.float32, "q", "must be float16 or bfloat16", q.dtype)
        self.check(columns in head_dims, "q", f"must have head_dim {named}", columns)
        self.check(v.shape[-1] == columns, values, "must have the head_dim of q", v.shape[-1])

    def check_tokens(self, q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> None:
        sequences = 1 if cu_seqlens is None else max(cu_seqlens.shape[0] - 1, 1)
        tokens = q.shape[-3]
        rule = f"must have {MIN_TOKENS} tokens for each sequence"
        self.check(tokens >= MIN_TOKENS * sequences, "q", rule, tokens)
        self.check(k.shape[-3] > 0, "k", "must have tokens", k.shape[-3])

    def check_layout(self, name: str, t: Tensor) -> None:
        past = t.data_ptr() % 16
        rule = "must start at a multiple of 16 bytes"
        self.check(past == 0, name, rule, f"{past} bytes past one")
        rule = f"must have strides that are multiples of 8, of {t.shape[-1]} or more"
        self.check(past > 0 or _has_mapped_strides(t), name, rule, t.stride())

    def check_scale(self, a: Any) -> None:
        scale = float32(a.q.shape[-1] ** -0.5 if a.scale is None else a.scale)
        self.check(scale >= 2**-126, "scale", "must be 2^-126 or more in float32", a.scale)
        softcap = float32(a.softcap)
        capped = softcap <= 0 or (softcap < float32(1e38) and scale >= 2**-64 * softcap)
        self.check(capped, "softcap", "must be below 1e38 and at most 2^64 scale", a.softcap)

    def check_tiles(self, q: Tensor, cu_seqlens_q: Tensor | None) -> None:
        tiles = max_tiles(q, cu_seqlens_q, 64)
        self.check(tiles <= MAX_TILES, "q", "must have at most 2^30 tiles of 64 rows", tiles)


def max_tiles(q: Tensor, cu_seqlens_q: Tensor | None, rows: int) -> int:
    """Upper bound on the number of tiles of `rows` queries, over all heads."""
    tokens, heads = q.shape[-3:-1]
    if cu_seqlens_q is not None:
        return int(heads * (tokens // rows + cu_seqlens_q.shape[0]))
    return int(q.shape[0] * heads * -(-tokens // rows))


def float32(x: float) -> float:
    return ctypes.c_float(x).value


def _has_mapped_strides(t: Tensor) -> bool:
    """Whether strides can be encoded in a tensor map: strides of extents of 1 are ignored, others
    must fit 40 bits, in bytes.
    """
    strides = (s for s, extent in zip(t.stride()[:-1], t.shape[:-1], strict=True) if extent > 1)
    return all(t.shape[-1] <= s < 2**39 and s % 8 == 0 for s in strides)
