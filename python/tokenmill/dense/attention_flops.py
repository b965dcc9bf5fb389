"""Operation counts of attention."""

from __future__ import annotations

from typing import Any

from .._flops import band, known, masked_pairs
from .attention_rules import Arguments


def flops(*lowered: Any) -> float:
    """Operations of the two products over visible pairs."""
    a = Arguments(*lowered)
    right = 0 if a.causal else a.window_right
    starts_q, starts_k = a.cu_seqlens_q, a.cu_seqlens_k
    if starts_q is None:
        sizes = [(a.q.shape[1], a.k.shape[1])] * a.q.shape[0]
    elif known(starts_q) and known(starts_k):
        sizes = [*zip(starts_q.diff().tolist(), starts_k.diff().tolist(), strict=True)]
    else:
        sizes = [(a.q.shape[0], a.k.shape[0])]
    pairs = sum(band(sq, sk, a.window_left, right) for sq, sk in sizes)
    mask = (a.mask_ranges, a.mask_q_spans, a.mask_k_spans)
    batch = 1 if starts_q is not None else a.q.shape[0]
    pairs = min(pairs, masked_pairs(*mask, batch, a.k.shape[-3]))
    return 2.0 * a.q.shape[-2] * pairs * (a.q.shape[-1] + a.v.shape[-1])


def backward_flops(*lowered: Any) -> float:
    """Five products over visible pairs."""
    return 2.5 * flops(*lowered)
