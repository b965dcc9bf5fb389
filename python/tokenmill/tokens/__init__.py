"""Tokens chosen, gathered, merged, scattered and pooled."""

from .segment_reduce import segment_reduce

__all__ = [
    "segment_reduce",
]
