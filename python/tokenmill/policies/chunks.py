"""Requests whose tokens are not the first of a row: chunks of prompts, and left padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dense.attention_decode import attention_decode


@dataclass
class Waiting:
    """A prompt whose last chunk is still to come, the tokens of each request first: [B, S, ...]."""

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor | None  # [B, S, H], of full attention
    lengths: Tensor

    @classmethod
    def nothing(cls, q: Tensor, k: Tensor, v: Tensor, like: Tensor) -> Waiting:
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_zeros(q.shape[0], 0, q.shape[2], dtype=wide)
        return cls(q[:, :0], k[:, :0], v[:, :0], lse, torch.zeros_like(like))

    def reordered(self, requests: Tensor) -> Waiting:
        q, k, v, lengths = (
            t.index_select(0, requests) for t in (self.q, self.k, self.v, self.lengths)
        )
        lse = None if self.lse is None else self.lse.index_select(0, requests)
        return Waiting(q, k, v, lse, lengths)


def joined(old: Tensor, new: Tensor, before: Tensor, width: int) -> Tensor:
    """[B, width, ...]: the first before[b] rows of old, then the rows of new, then arbitrary
    rows.
    """
    at = torch.arange(width, device=old.device)
    there = before[:, None].long()
    source = torch.where(at < there, at, old.shape[1] + at - there)
    last = max(old.shape[1] + new.shape[1] - 1, 0)
    return of_rows(torch.cat([old, new], 1), source.clamp(max=last))


def rolled(x: Tensor, by: Tensor) -> Tensor:
    """x [B, S, ...] with the rows of request b rotated by by[b], wrapping around."""
    tokens = x.shape[1]
    at = torch.arange(tokens, device=x.device) - by[:, None].long()
    return of_rows(x, at % max(tokens, 1))


def of_rows(x: Tensor, at: Tensor) -> Tensor:
    """x [B, S, ...] at rows [B, n]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], at]


def attend_last(
    q: Tensor, k: Tensor, v: Tensor, n: Tensor, count: Tensor, *,
    block_table: Tensor | None = None, **scoring: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal attention of queries [B, S, H, D], the first count[b] of which are the last of n[b]
    tokens; returns out [B, S, H, Dv] and lse [B, H, S].
    """
    missing = q.shape[1] - count
    out, lse = attention_decode(
        rolled(q, missing), k, v, seqlens_k=n, block_table=block_table, return_lse=True, **scoring
    )
    return rolled(out, -missing), rolled(lse.transpose(1, 2), -missing).transpose(1, 2)
