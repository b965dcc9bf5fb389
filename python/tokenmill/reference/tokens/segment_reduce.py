"""segment_reduce: rows x[perm_p] at positions offsets_s <= p < offsets_(s + 1) are reduced to one.

    sum: y_s = sum_p w_p x[perm_p];    mean: y_s / sum_p w_p

The others take, per channel, the maximum or the minimum, or the first or the last row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def segment_reduce(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, N, C], offsets [B, S + 1], perm [B, P] or None, weight [B, N] or None: y [B, S, C],
    weight_sum [B, S], and for amax and amin the row that each number comes from, [B, S, C].
    """
    batch, tokens, channels = a.x.shape
    segments = a.offsets.shape[1] - 1
    bins = batch * (segments + 1)
    wide = torch.promote_types(a.x.dtype, torch.float32)
    row, bin_ = _places(a)

    # Entries of -1 read an extra row after the last.
    x = torch.nn.functional.pad(a.x, (0, 0, 0, 1))
    if a.weight is None:
        w = x.new_ones(row.shape, dtype=wide)
    else:
        w = torch.nn.functional.pad(a.weight, (0, 1)).gather(1, row)
    weight_sum = _sums(bin_, w, bins)

    arg = x.new_empty(0, dtype=torch.int32)
    if a.reduce in ("sum", "mean"):
        rows = x.gather(1, row[..., None].expand(-1, -1, channels)).to(wide)
        empty = (weight_sum == 0)[:, None]
        if a.reduce == "mean":
            rows = rows.masked_fill(empty[bin_], 0.0)
        y = _sums(bin_, rows * w[..., None], bins)
        if a.reduce == "mean":
            y = y / weight_sum[:, None].masked_fill(empty, 1.0)
        y = y.to(x.dtype).view(batch, segments + 1, channels)[:, :segments]
    else:
        place = _chosen_places(x, row, bin_, segments, a.reduce)
        found = torch.nn.functional.pad(row, (0, 1), value=tokens)[..., None]
        found = found.expand(-1, -1, channels).gather(1, place)
        y = x.gather(1, found)
        if a.reduce in ("amax", "amin"):
            arg = found.masked_fill(found == tokens, -1).int()
    return y, weight_sum.view(batch, segments + 1)[:, :segments], arg


def _places(a: Any) -> tuple[Tensor, Tensor]:
    """[B, P]: for each position the row of x, N for none, and its segment s of batch row b as b (S
    + 1) + s, where s = S means none.
    """
    batch, tokens, _ = a.x.shape
    segments = a.offsets.shape[1] - 1
    places = tokens if a.perm is None else a.perm.shape[1]
    place = torch.arange(places, dtype=torch.int32, device=a.x.device).repeat(batch, 1)
    segment = torch.searchsorted(a.offsets.contiguous(), place, right=True) - 1
    row = place.long() if a.perm is None else a.perm.long()
    out = (segment < 0) | (segment >= segments) | (row < 0)
    segment = segment.masked_fill(out, segments)
    first = torch.arange(batch, device=a.x.device)[:, None] * (segments + 1)
    return row.masked_fill(out, tokens), first + segment


def _sums(bin_: Tensor, values: Tensor, bins: int) -> Tensor:
    """Sums of values [B, P, ...] per bin."""
    flat = values.flatten(0, 1)
    return flat.new_zeros((bins, *flat.shape[1:])).index_add(0, bin_.flatten(), flat)


def _chosen_places(x: Tensor, row: Tensor, bin_: Tensor, segments: int, reduce: str) -> Tensor:
    """[B, S, C]: position of the row that a segment takes, P for none."""
    batch, places = row.shape
    channels = x.shape[2]
    index = bin_.flatten()[:, None].expand(-1, channels)
    place = torch.arange(places, device=x.device).repeat(batch)[:, None].repeat(1, channels)

    if reduce in ("amax", "amin"):
        rows = x.detach().gather(1, row[..., None].expand(-1, -1, channels)).flatten(0, 1)
        rows = rows if reduce == "amax" else -rows
        maximum = rows.new_full((batch * (segments + 1), channels), -torch.inf)
        maximum = maximum.scatter_reduce(0, index, rows, "amax")  # NaN wins
        best = (rows == maximum.gather(0, index)) | rows.isnan()
        place = place.masked_fill(~best, places)

    none = torch.full((batch * (segments + 1), channels), -1 if reduce == "last" else places)
    none = none.to(x.device)
    chosen = none.scatter_reduce(0, index, place, "amax" if reduce == "last" else "amin")
    chosen = chosen.masked_fill(chosen < 0, places).view(batch, segments + 1, channels)
    return chosen[:, :segments]
