"""Attention to blocks of keys, and which blocks."""

from .hip_block_select import hip_block_select

__all__ = ["hip_block_select"]
