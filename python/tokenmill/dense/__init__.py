"""Attention with any score map."""

from .attention import attention, sigmoid_attention
from .attention_decode import attention_decode
from .merge_attention_states import merge_attention_states
from .pattention import pattention
from .reweighted_attention import reweighted_attention
from .soft_causal_attention import soft_causal_attention

__all__ = [
    "attention",
    "attention_decode",
    "merge_attention_states",
    "pattention",
    "reweighted_attention",
    "sigmoid_attention",
    "soft_causal_attention",
]
