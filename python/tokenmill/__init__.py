"""tokenmill: attention beyond plain softmax, and choosing, gathering and merging tokens.

Every function runs on one of four backends with one meaning: plain PyTorch ("reference"), native
C++ ("cpu"), CUDA ("cuda") and Triton ("triton"). `torch.ops.tokenmill.*` are the same operators
for other frameworks.
"""

from . import dense, linear, select, testing
from .check import InputError
from .dense import attention, attention_decode, merge_attention_states, sigmoid_attention
from .dispatch import backends, explain
from .info import build_info
from .linear import (
    lightning_attention,
    lightning_slopes,
    linear_attention,
    linear_attention_decode,
)
from .select import topk_select
from .version import __version__

__all__ = [
    "InputError",
    "__version__",
    "attention",
    "attention_decode",
    "backends",
    "build_info",
    "dense",
    "explain",
    "lightning_attention",
    "lightning_slopes",
    "linear",
    "linear_attention",
    "linear_attention_decode",
    "merge_attention_states",
    "select",
    "sigmoid_attention",
    "testing",
    "topk_select",
]
