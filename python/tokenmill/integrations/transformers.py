"""Hugging Face transformers: attention on :func:`tokenmill.attention` (register), generate() under
a policy (apply_policy), recurrences of language models and token reduction in vision transformers
(patch).

Needs transformers 5.4 or later, whose masks are built from the lengths of queries and keys;
apply_policy and patch need 5.24.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator

import torch

from .._check import needs

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ModuleNotFoundError as missing:
    raise needs("transformers", missing) from missing

from .._transformers.attention import Kind, attention_forward
from .._transformers.growing import GrowingCache
from .._transformers.masks import build_mask
from .._transformers.models import pretrained
from .._transformers.pages import give_pages
from .._transformers.watch import watch_attention
from ._patch import patch, unpatch
from ._policy_cache import AppliedPolicy, PolicyCache, apply_policy

__all__ = [
    "AppliedPolicy",
    "GrowingCache",
    "PolicyCache",
    "apply_policy",
    "attention_forward",
    "build_mask",
    "continuous_batching",
    "patch",
    "register",
    "unpatch",
    "watch_attention",
]


def register(name: str = "tokenmill", *, backend: str | None = None, kind: Kind = "softmax") -> str:
    """Adds an attention implementation to transformers.

    Args:
        name: the value for attn_implementation.
        backend: as in :func:`tokenmill.attention`.
        kind: "softmax", which keeps the meaning of a pretrained model, or "sigmoid" (with a score
            bias of -log n, n being the number of keys that are not padding; with a complete mask,
            of all keys) to train one.

    Returns:
        name.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from tokenmill.integrations.transformers import register
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertModel(config).eval()
        >>> model.set_attn_implementation(register())
    """
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise RuntimeError(
            f"tokenmill needs transformers 5.4 or later; got {transformers.__version__}"
        )
    function = functools.partial(attention_forward, kind=kind, backend=backend)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, build_mask)
    return name


@contextlib.contextmanager
def continuous_batching(
    model: torch.nn.Module, *, backend: str | None = None, pages: bool = True
) -> Iterator[None]:
    """A context manager in which ``generate_batch`` and the like use tokenmill's attention.

    transformers keeps keys and values in pages. It passes block tables only to flash-attn, and
    gathers the keys of each request for all other implementations, which it calls with packed
    sequences. It accepts implementations by name, "sdpa" and names containing "flash", which
    set_attn_implementation does not.

    Args:
        model: a decoder of transformers.
        backend: as in :func:`register`.
        pages: layers with full attention read their pages in place (transformers 5.24 or later) if
            the page size is a power of two; with False, a window, other page sizes or older
            releases, keys are gathered.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tokenmill.integrations.transformers import continuous_batching
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=4)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with continuous_batching(model):
        ...     model.config._attn_implementation
        'tokenmill_flash'
    """
    name = "tokenmill_flash" if backend is None else f"tokenmill_{backend}_flash"
    register(name, backend=backend)
    before = {id(m.config): (m.config, m.config._attn_implementation) for m in pretrained(model)}
    for config, _ in before.values():
        config._attn_implementation_internal = name
    read_pages = model.register_forward_pre_hook(give_pages, with_kwargs=True) if pages else None
    try:
        yield
    finally:
        if read_pages is not None:
            read_pages.remove()
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation
