"""Attention to some blocks of keys, chosen for each block of queries."""

from .block_sparse import block_sparse_attention
from .transpose_list import transpose_block_list

__all__ = ["block_sparse_attention", "transpose_block_list"]
