"""Attention to listed keys and to listed blocks of keys."""

from .bilevel_routing_attention import bilevel_routing_attention
from .block_sparse_attention import block_sparse_attention
from .core_context_attention import CoreContextState, core_context_attention
from .hip_attention import HipLists, hip_attention
from .landmark_attention import landmark_attention
from .landmark_decode import landmark_decode
from .moba_attention import moba_attention
from .native_sparse_attention import native_sparse_attention
from .sparse_decode_attention import sparse_decode_attention
from .transpose_block_list import transpose_block_list

__all__ = [
    "CoreContextState",
    "HipLists",
    "bilevel_routing_attention",
    "block_sparse_attention",
    "core_context_attention",
    "hip_attention",
    "landmark_attention",
    "landmark_decode",
    "moba_attention",
    "native_sparse_attention",
    "sparse_decode_attention",
    "transpose_block_list",
]
