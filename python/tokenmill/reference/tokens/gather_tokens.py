"""gather_tokens: out_i = x[indices_i], and 0 where the index is -1."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import places_of


def gather_tokens(x: Tensor, indices: Tensor) -> tuple[Tensor]:
    if indices.dim() == 1:
        rows, places = x.flatten(0, 1)[None], indices[None]
    else:
        rows, places = x, indices
    # An index of -1 reads a row of zeros appended after the last.
    padded = torch.cat((rows, rows.new_zeros(len(rows), 1, rows.shape[2])), 1)
    found = padded[places_of(places, rows.shape[1])]
    return (found[0] if indices.dim() == 1 else found,)
