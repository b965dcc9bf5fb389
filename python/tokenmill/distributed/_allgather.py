"""Attention of this rank's queries to the gathered keys of all ranks."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..dense.attention import attention
from ._call import Call, Part, visible
from .sequence import Piece, in_order


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    width = k.shape[-1]
    together = call.group.gather(torch.cat([k, v], -1), -3, call.where.sizes)
    keys, values = in_order(together, -3, call.where).split([width, v.shape[-1]], -1)
    outs, statistics, at = [], [], 0
    for piece in call.where.pieces[call.group.rank]:
        rows = q.narrow(-3, at, piece.size)
        at += piece.size
        for parts in _together(piece, call):
            first, end = parts[0].rows.first, parts[-1].rows.end
            out, lse = _attend(
                rows.narrow(-3, first - piece.first, end - first), keys, values, parts, call
            )
            outs.append(out)
            statistics.append(lse)
    return torch.cat(outs, -3), torch.cat(statistics, -1)


def _together(piece: Piece, call: Call) -> list[list[Part]]:
    """The rows of a piece with their visible keys, grouped so that one call serves a group: packed
    sequences with equal windows.
    """
    ends = [0, call.where.length] if call.cu_seqlens is None else call.cu_seqlens.tolist()
    groups: list[list[Part]] = []
    for begin, end in itertools.pairwise(ends):
        rows = Piece(max(begin, piece.first), min(end, piece.end))
        part = visible(rows, Piece(begin, end), call.left, call.right)
        if part is None:
            continue
        if groups and groups[-1][0].window == part.window:
            groups[-1].append(part)
        else:
            groups.append([part])
    # A rank without tokens makes the call too: the other ranks' backward needs it.
    return groups or [[Part(Piece(piece.first, piece.first), Piece(0, 0), (-1, -1))]]


def _attend(
    rows: Tensor, keys: Tensor, values: Tensor, parts: list[Part], call: Call
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = dict(call.options)
    if call.cu_seqlens is not None:
        for name, of in (("cu_seqlens_q", "rows"), ("cu_seqlens_k", "keys")):
            ends = itertools.accumulate((getattr(p, of).size for p in parts), initial=0)
            options[name] = torch.tensor([*ends], dtype=torch.int32, device=rows.device)
    begin, end = parts[0].keys.first, parts[-1].keys.end
    statistic = options["kind"] == "softmax" or options["normalize"] == "sum"
    found: Any = attention(
        rows, keys.narrow(-3, begin, end - begin), values.narrow(-3, begin, end - begin),
        window=parts[0].window, return_lse=statistic, **options,
    )  # fmt: skip
    return found if statistic else (found, rows.new_empty(0, dtype=torch.float32))
