"""Selecting, gathering, merging, scattering and pooling tokens."""

from .best_match import best_match
from .bipartite_match import bipartite_match
from .cluster_tokens import cluster_tokens
from .gather_fuse import gather_fuse
from .gather_tokens import gather_tokens
from .local_pool import local_pool
from .mask_partition import mask_partition
from .merge_tokens import merge_tokens, unmerge_tokens
from .reconstruct_tokens import reconstruct_tokens
from .reposition_tokens import reposition_tokens, subject_boxes
from .scatter_tokens import scatter_tokens
from .segment_reduce import segment_reduce
from .topk_partition import topk_partition
from .video_prune import video_prune

__all__ = [
    "best_match",
    "bipartite_match",
    "cluster_tokens",
    "gather_fuse",
    "gather_tokens",
    "local_pool",
    "mask_partition",
    "merge_tokens",
    "reconstruct_tokens",
    "reposition_tokens",
    "scatter_tokens",
    "segment_reduce",
    "subject_boxes",
    "topk_partition",
    "unmerge_tokens",
    "video_prune",
]
