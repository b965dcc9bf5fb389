"""Sequences that a batch entry packs, as transformers names them, and their states."""

from __future__ import annotations

import torch
from torch import Tensor


def offsets_of(cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """Offsets of the sequences that a batch entry packs, from transformers' cu_seq_lens_q or from
    the index of the sequence of each token, [1, T].
    """
    if cu_seqlens is not None:
        return cu_seqlens.to(torch.int32)
    if seq_idx is None:
        return None
    starts = torch.nn.functional.pad(seq_idx[0].diff() != 0, (1, 0), value=True).nonzero()[:, 0]
    return torch.nn.functional.pad(starts, (0, 1), value=seq_idx.shape[1]).to(torch.int32)


def first_of(state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """States before packed sequences: the first sequence goes on from a cached state [1, ...], the
    others begin.
    """
    if state is None or cu_seqlens is None:
        return state
    return torch.cat([state, state.new_zeros(cu_seqlens.shape[0] - 2, *state.shape[1:])])


def last_of(state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What a cache keeps of the states after packed sequences: the last one, [1, ...]."""
    return state if cu_seqlens is None else state[-1:]


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
