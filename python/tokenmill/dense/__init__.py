"""Attention with any score map."""

from .additive_attention import additive_attention, pointer_argmax
from .amplified_attention import amplified_attention
from .attention import attention
from .attention_decode import attention_decode
from .merge_attention_states import merge_attention_states
from .multi_subject_attention import multi_subject_attention
from .pattention import pattention
from .redistributed_attention import redistributed_attention
from .reweighted_attention import reweighted_attention
from .sigmoid_attention import sigmoid_attention
from .sink_calibrated_attention import sink_calibrated_attention
from .soft_causal_attention import soft_causal_attention

__all__ = [
    "additive_attention",
    "amplified_attention",
    "attention",
    "attention_decode",
    "merge_attention_states",
    "multi_subject_attention",
    "pattention",
    "pointer_argmax",
    "redistributed_attention",
    "reweighted_attention",
    "sigmoid_attention",
    "sink_calibrated_attention",
    "soft_causal_attention",
]
