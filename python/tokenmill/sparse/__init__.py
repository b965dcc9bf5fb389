"""Attention to blocks of keys, and which blocks."""

from .bilevel_routing import bilevel_routing_attention
from .block_sparse import block_sparse_attention
from .core_context import CoreContextState, core_context_attention
from .hip_attention import HipLists, hip_attention
from .hip_block_select import hip_block_select
from .landmark import landmark_attention, landmark_decode
from .transpose_list import transpose_block_list

__all__ = [
    "CoreContextState",
    "HipLists",
    "bilevel_routing_attention",
    "block_sparse_attention",
    "core_context_attention",
    "hip_attention",
    "hip_block_select",
    "landmark_attention",
    "landmark_decode",
    "transpose_block_list",
]
