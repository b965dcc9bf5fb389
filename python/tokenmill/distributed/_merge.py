"""Sequential merging, in float32, of results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dense.merge_attention_states import merge_attention_states
from ._group import Group

SUM_FLOOR = 1e-8  # added to a row sum, as in attention


class Merge:
    """Merges parts into out [B, n, H, Dv] and the row statistics [B, H, n], both float32."""

    def __init__(self, kind: str, normalize: str | None, backend: str | None) -> None:
        self.kind, self.normalize, self.backend = kind, normalize or "none", backend

    def start(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        batch, rows, heads, _ = shape
        out = like.new_zeros(shape, dtype=torch.float32)
        empty = -torch.inf if self.kind == "softmax" else 0.0
        return out, out.new_full((batch, heads, rows), empty)

    def add(self, out: Tensor, statistic: Tensor, part: Tensor, of_part: Tensor) -> None:
        if self.kind == "softmax":
            outs, lses = torch.stack([out, part.float()]), torch.stack([statistic, of_part])
            merged, lse = merge_attention_states(outs, lses, backend=self.backend)
            out.copy_(merged)
            statistic.copy_(lse)
        elif self.normalize == "none":
            out += part
        else:
            out.addcmul_(part.float(), _of_rows(self._divisor(of_part)))
            statistic += of_part

    def finish(self, out: Tensor, statistic: Tensor) -> Tensor:
        if self.kind == "softmax" or self.normalize == "none":
            return out
        divisor = self._divisor(statistic)
        if self.normalize == "count":
            divisor = divisor.clamp(min=1)  # a row with no visible key has out 0
        return out / _of_rows(divisor)

    def of_ranks(self, group: Group, out: Tensor, statistic: Tensor) -> tuple[Tensor, Tensor]:
        """Merges the parts of all ranks, in rank order, on every rank: one gather."""
        total, of_total = self.start(out.shape, out)
        if statistic.numel() == 0:
            statistic = torch.zeros_like(of_total)
        sent = torch.cat([out.float(), statistic.float().transpose(1, 2)[..., None]], -1)
        for part in group.gather(sent[None], 0, [1] * group.size):
            of_part = part[..., -1].transpose(1, 2).contiguous()
            self.add(total, of_total, part[..., :-1], of_part)
        return self.finish(total, of_total), of_total

    def _divisor(self, statistic: Tensor) -> Tensor:
        """The divisor that attention applies to a row."""
        if self.normalize == "count":
            return statistic
        return statistic.abs().clamp(min=1) if self.kind == "linear" else statistic + SUM_FLOOR


def _of_rows(x: Tensor) -> Tensor:
    """[B, H, n] broadcastable with [B, n, H, D]."""
    return x.transpose(1, 2)[..., None]
