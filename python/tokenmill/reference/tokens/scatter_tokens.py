"""scatter_tokens: out[indices_i] = y_i, and base, or 0, elsewhere; -1 skips the row."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import places_of


def scatter_tokens(
    y: Tensor, indices: Tensor, base: Tensor | None, batch: int, tokens: int
) -> tuple[Tensor]:
    channels = y.shape[-1]
    out = y.new_zeros(batch, tokens, channels) if base is None else base
    if indices.dim() == 1:
        rows, places, out = y[None], indices[None], out.reshape(1, batch * tokens, channels)
    else:
        rows, places = y, indices
    # Rows with index -1 go to an extra row after the last.
    padded = torch.cat((out, out.new_zeros(len(out), 1, channels)), 1)
    scattered = padded.index_put(places_of(places, out.shape[1]), rows)[:, :-1]
    return (scattered.reshape(batch, tokens, channels).clone(),)
