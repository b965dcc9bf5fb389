"""Attention with any score map."""

from .attention import attention, sigmoid_attention
from .attention_decode import attention_decode
from .merge_attention_states import merge_attention_states

__all__ = ["attention", "attention_decode", "merge_attention_states", "sigmoid_attention"]
