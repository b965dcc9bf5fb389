"""Attention over the pages of transformers' continuous batching, without gathering them.

transformers describes a batch by slots in its cache: read_index holds the slots of all keys,
request after request, and write_index the slots of new keys. Slot p is row p % page size of page p
// page size, so the first slot of each page gives the block table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dense.attention import attention

try:  # transformers 5.24
    from transformers.generation.continuous_batching import PagedAttentionCache
    from transformers.generation.continuous_batching.cache_allocators import CacheAllocator

    _Cache: Any = PagedAttentionCache
    HAS_ALLOCATORS = hasattr(CacheAllocator, "get_cache_for_block_table")
except ImportError:
    _Cache = object
    HAS_ALLOCATORS = False


class Pages(NamedTuple):
    """Keys and values of one layer, ``[pages, page size, Hk, D]``, and the block table ``[requests,
    columns]``.
    """

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor


class _CacheInPlace(_Cache):
    """The cache of one model call, sharing its state with the cache of transformers."""

    __slots__ = ("tables",)

    def __init__(self, cache: Any) -> None:
        object.__setattr__(self, "__dict__", vars(cache))
        self.tables: dict[int, Tensor] = {}  # one per group of layers

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values ``[1, Hk, T, D]``, and passes the pages in kwargs instead
        of gathering them.
        """
        allocator = self.layer_to_allocator[layer_idx]
        read_index = kwargs["read_index"][allocator.index]
        in_place = allocator.supports_block_table and read_index.numel() > 0
        if in_place:  # without an index all keys are new, and there is nothing to gather
            k_cache, v_cache = allocator.get_cache_for_block_table(layer_idx)
            size = k_cache.shape[1]
            in_place = size & (size - 1) == 0  # required by tokenmill.attention
        if not in_place:
            gathered: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, layer_idx, kwargs
            )
            return gathered
        kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"][allocator.layer_type].to(torch.int32)
        kwargs["max_length_k"] = kwargs["max_length_k"][allocator.layer_type]
        slots = kwargs["write_index"][allocator.index]
        rows = slots // size, slots % size
        for pages, new in ((k_cache, key_states), (v_cache, value_states)):
            pages.index_put_(rows, new.squeeze(0).transpose(0, 1))
        if allocator.index not in self.tables:
            self.tables[allocator.index] = block_table(
                read_index, kwargs["cu_seq_lens_k"], kwargs["max_length_k"], size
            )
        kwargs["tokenmill_pages"] = Pages(k_cache, v_cache, self.tables[allocator.index])
        return key_states, value_states


def give_pages(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a model: lets a paged cache be read in place."""
    cache = kwargs.get("cache")
    if not HAS_ALLOCATORS or not isinstance(cache, _Cache):
        return None
    if kwargs.get("block_table") is not None:
        return None
    return args, {**kwargs, "cache": _CacheInPlace(cache)}


def block_table(read_index: Tensor, cu_seqlens_k: Tensor, longest: int, page_size: int) -> Tensor:
    """``[requests, columns]`` int32. Entries past the end of a request name an arbitrary existing
    page.
    """
    columns = torch.arange(-(-longest // page_size), device=read_index.device) * page_size
    places = cu_seqlens_k[:-1, None].long() + columns
    places = places.clamp(max=read_index.numel() - 1)
    return (read_index[places] // page_size).int()


def attend_to_pages(
    q: Tensor,
    pages: Pages,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    **options: Any,
) -> Tensor:
    """[1, T, H, D] -> [1, T, H, Dv], with the T tokens as sequences given by cu_seqlens_q."""
    out = attention(
        q.flatten(0, 1),
        pages.k_cache,
        pages.v_cache,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        seqlens_k=cu_seqlens_k.diff(),
        block_table=pages.block_table,
        **options,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, q.shape[:2])
