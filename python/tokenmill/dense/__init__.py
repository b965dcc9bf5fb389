"""Attention with any score map."""

from .attention import attention, sigmoid_attention
from .merge import merge_attention_states

__all__ = ["attention", "merge_attention_states", "sigmoid_attention"]
