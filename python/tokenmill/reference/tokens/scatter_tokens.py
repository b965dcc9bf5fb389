"""scatter_tokens: out[indices_i] = y_i, and base, or 0, elsewhere; -1 skips the row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gather_tokens import places_of


def scatter_tokens(a: Any) -> tuple[Tensor]:
    """y [B, K, C] and indices [B, K], or [K, C] and [K] into all tokens; base [B, N, C] or None."""
    channels = a.y.shape[-1]
    rows, places = a.y, a.indices
    out = a.y.new_zeros(a.batch, a.tokens, channels) if a.base is None else a.base
    if a.indices.dim() == 1:
        rows, places = a.y[None], a.indices[None]
        out = out.reshape(1, a.batch * a.tokens, channels)
    # Rows with index -1 go to an extra row after the last.
    padded = torch.cat((out, out.new_zeros(len(out), 1, channels)), 1)
    scattered = padded.index_put(places_of(places, out.shape[1]), rows)[:, :-1]
    return (scattered.reshape(a.batch, a.tokens, channels).clone(),)
