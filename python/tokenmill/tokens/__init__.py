"""Tokens chosen, gathered, merged, scattered and pooled."""

from .mask_partition import mask_partition
from .segment_reduce import segment_reduce
from .topk_partition import topk_partition

__all__ = [
    "mask_partition",
    "segment_reduce",
    "topk_partition",
]
