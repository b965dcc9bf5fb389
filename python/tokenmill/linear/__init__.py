"""Attention as a recurrence over a state: cost linear in the length."""

from .causal_conv1d import causal_conv1d
from .causal_conv1d_decode import causal_conv1d_decode
from .delta_attention import delta_attention
from .delta_attention_decode import delta_attention_decode
from .lightning_slopes import lightning_slopes
from .linear_attention import lightning_attention, linear_attention
from .linear_attention_decode import linear_attention_decode
from .titans_memory import titans_memory
from .titans_memory_decode import titans_memory_decode

__all__ = [
    "causal_conv1d",
    "causal_conv1d_decode",
    "delta_attention",
    "delta_attention_decode",
    "lightning_attention",
    "lightning_slopes",
    "linear_attention",
    "linear_attention_decode",
    "titans_memory",
    "titans_memory_decode",
]
