"""Operators on sequences sharded over ranks of torch.distributed.

Each rank calls the function with its shard of the tokens (:func:`shard_sequence`); the functions
communicate through the collectives of a process group or a device mesh, and are differentiable.
"""

from ._group import PeerError
from .attention import attention, sigmoid_attention
from .attention_decode import attention_decode
from .block_sparse_attention import block_sparse_attention
from .context import context_parallel
from .hip_attention import hip_attention
from .indexer_topk_select import indexer_topk_select
from .linear import lightning_attention, linear_attention
from .plan import Cost, plan
from .sequence import shard_sequence, unshard_sequence
from .sharding import register_sharding
from .sparse_decode_attention import sparse_decode_attention
from .topk_select import topk_select

register_sharding()

__all__ = [
    "Cost",
    "PeerError",
    "attention",
    "attention_decode",
    "block_sparse_attention",
    "context_parallel",
    "hip_attention",
    "indexer_topk_select",
    "lightning_attention",
    "linear_attention",
    "plan",
    "register_sharding",
    "shard_sequence",
    "sigmoid_attention",
    "sparse_decode_attention",
    "topk_select",
    "unshard_sequence",
]
