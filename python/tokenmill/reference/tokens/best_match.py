"""best_match: argmax_j and max_j of a_i . b_j, or of their cosine; ties to the lower j."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FLOAT = torch.finfo(torch.float32)


def best_match(record: Any) -> tuple[Tensor, Tensor]:
    """a [B, Na, C], b [B, Nb, C]: index and score [B, Na]."""
    a, b = record.a, record.b
    wide = torch.promote_types(a.dtype, torch.float32)
    x, y = a.to(wide), b.to(wide)
    if record.normalize:
        x, y = unit_rows(x), unit_rows(y)
    return best_products(x @ y.transpose(1, 2))


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their norms, zeros where the norm is 0, NaN where it is not finite; the norm
    is rounded to float32.
    """
    squares = x.square().sum(-1, keepdim=True)
    unit = torch.where(squares < _FLOAT.tiny, 0, x / squares.sqrt())
    return torch.where(squares <= _FLOAT.max, unit, torch.nan)


def best_products(products: Tensor) -> tuple[Tensor, Tensor]:
    """Index and value of the maximum of each row of [B, Na, Nb]."""
    batch, rows, partners = products.shape
    if partners == 0:
        none = products.new_full((batch, rows), -torch.inf)
        return none.new_full(none.shape, -1, dtype=torch.int32), none
    score, index = torch.where(products == products, products, -torch.inf).max(-1)
    return index.int(), score
