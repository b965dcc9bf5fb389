"""An attention call on shards, and its windows between pieces of the sequence, in each piece's own
coordinates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ._group import Group
from .sequence import Layout, Piece


class Call(NamedTuple):
    """An attention call on the shards of a group."""

    group: Group
    where: Layout
    options: dict[str, Any]  # options of tokenmill.attention
    left: int | None  # number of visible keys to the left of a query; None = all
    right: int | None
    cu_seqlens: Tensor | None
    return_lse: bool


class Part(NamedTuple):
    """Rows and keys of the whole sequence that see each other, and the window between them."""

    rows: Piece
    keys: Piece
    window: tuple[int, int]


def visible(rows: Piece, keys: Piece, left: int | None, right: int | None) -> Part | None:
    """The rows that see any of the keys j with i - left <= j <= i + right, and these keys; None if
    there are none. A window of attention is aligned at the last row and the last key.
    """
    first = rows.first if right is None else max(rows.first, keys.first - right)
    end = rows.end if left is None else min(rows.end, keys.end + left)
    begin = keys.first if left is None else max(keys.first, first - left)
    stop = keys.end if right is None else min(keys.end, end + right)
    if first >= end or begin >= stop:
        return None
    ahead = stop - end  # relative to the last row's position
    window = -1 if left is None else left + ahead, -1 if right is None else right - ahead
    return Part(Piece(first, end), Piece(begin, stop), window)
