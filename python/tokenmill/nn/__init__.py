"""Modules with the defaults of the papers, on top of the operators.

Example:
    >>> import torch
    >>> from tokenmill import nn
    >>> layer = nn.BiFormerAttention(64, num_heads=2, topk=4)
    >>> layer(torch.randn(1, 56, 56, 64)).shape
    torch.Size([1, 56, 56, 64])
"""

from .biformer import BiFormerAttention
from .class_token import ClsTokenPruning, EViTReorganize
from .pooling import PoolFormerMixing, SegmentPooling
from .sparsifiner import SparsifinerAttention
from .tome import TokenMerging

__all__ = [
    "BiFormerAttention",
    "ClsTokenPruning",
    "EViTReorganize",
    "PoolFormerMixing",
    "SegmentPooling",
    "SparsifinerAttention",
    "TokenMerging",
]
