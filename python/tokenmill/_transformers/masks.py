"""Masks of transformers' models: their mask interface, and masks in the forms that kernels take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .._call.sharded import sharded_attention


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """The mask of all layers of one kind, in transformers' mask interface.

    Args:
        batch_size, q_length, kv_length: B, Sq and Sk.
        q_offset, kv_offset: positions of the first query (a tensor for a static cache) and key.
        mask_function: from indices (batch, head, query, key) to visible.
        attention_mask: ``[B, tokens so far]``, False on padding.
        local_size: the window or chunk size in mask_function.
        allow_is_causal_skip: mask_function is only causality and local_size.
        allow_is_bidirectional_skip: mask_function is only local_size.
        options: passed on to transformers' own mask function.

    Returns:
        None or a padding mask ``[B, Sk]`` if the only other masking is causality with the last
        query at the last key; else the complete boolean mask ``[B, 1, Sq, Sk]``. True is visible.
    """
    if sharded_attention.get() and attention_mask is None:
        return None  # causality and windows refer to positions in the whole sequence
    end = kv_offset + kv_length
    plain = allow_is_causal_skip or allow_is_bidirectional_skip
    if allow_is_causal_skip and not (isinstance(q_offset, int) and q_offset + q_length == end):
        plain = False  # the last query is not at the last key: a cache with spare capacity
    if plain and (local_size is None or kv_length < local_size):
        if attention_mask is None:
            return None
        if not torch.compiler.is_compiling():
            missing = max(end - attention_mask.shape[1], 0)
            padding = torch.nn.functional.pad(attention_mask, (0, missing))[:, kv_offset:end]
            return None if bool(padding.all()) else padding
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **options,
    )


def complete_mask(
    mask: Tensor | None, sq: int, sk: int, causal: bool, sliding_window: int | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, device: torch.device,
) -> Tensor | None:  # fmt: skip
    """A mask for attention_forward that includes all masking; None for plain causality."""
    if cu_seqlens_q is None and (mask.dim() == 4 if mask is not None else sliding_window is None):
        return None if mask is None else mask[..., :sk]
    query = torch.arange(sq, device=device)[:, None]
    key = torch.arange(sk, device=device)
    visible = torch.ones(1, 1, sq, sk, dtype=torch.bool, device=device)
    if cu_seqlens_q is not None:
        ends_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        of_q, of_k = (
            torch.searchsorted(ends, at.flatten(), right=True)
            for ends, at in ((cu_seqlens_q, query.int()), (ends_k, key.int()))
        )
        visible &= of_q[:, None] == of_k
        # The last query of a sequence is at its last key.
        query = query + (ends_k[of_q] - cu_seqlens_q[of_q])[:, None]
    else:
        query = query + sk - sq
        if mask is not None:
            visible = visible & mask[:, None, None]
    if causal:
        visible = visible & (key <= query)
    if sliding_window is not None and mask is None:
        visible = visible & ((key - query).abs() < sliding_window)
    return visible


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as an additive bias of dtype or float32, without materialising expanded dimensions."""
    for dim in range(mask.dim() - 1):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
    return mask.to(torch.promote_types(mask.dtype, dtype)).contiguous()
