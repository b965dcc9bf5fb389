"""Attention as a recurrence over a state: cost linear in the length."""

from .decode import linear_attention_decode
from .linear_attention import lightning_attention, linear_attention
from .slopes import lightning_slopes

__all__ = [
    "lightning_attention",
    "lightning_slopes",
    "linear_attention",
    "linear_attention_decode",
]
