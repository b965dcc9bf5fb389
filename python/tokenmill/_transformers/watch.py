"""Queries and keys of a transformers model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from .._check import check, fail
from .attention import attention_forward
from .masks import build_mask
from .models import POLICY, configs_of

WATCH = "integrations.transformers.watch_attention"
WATCHED = "tokenmill_watched"
Visit = Callable[[int, Tensor, Tensor, dict[str, Any]], None]


@contextlib.contextmanager
def watch_attention(
    model: torch.nn.Module, visit: Visit, *, backend: str | None = None
) -> Iterator[None]:
    """A context manager in which the layers of a model expose their queries and keys, and attend
    with tokenmill.

    Inputs for profiling heads: :func:`tokenmill.policies.profile_retrieval_heads`,
    :func:`tokenmill.policies.profile_repeated_tokens`.

    Args:
        model: a decoder of transformers 5.4 or later, without a policy.
        visit: visit(layer, q, k, scoring) is called before each layer attends: its number, q ``[B,
            n, H, D]`` and k ``[B, S, Hk, D]`` after the rotary embedding and including cached keys,
            and the scale, softcap and sink of :func:`tokenmill.attention`.
        backend: as in :func:`register`.

    Raises:
        RuntimeError: naming argument, rule and value.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tokenmill.integrations.transformers import watch_attention
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2)
        >>> model, found = LlamaForCausalLM(config).eval(), {}
        >>> with watch_attention(model, lambda layer, q, k, scoring: found.update({layer: (q, k)})):
        ...     _ = model(torch.randint(50, (1, 9)))
        >>> [tuple(t.shape) for t in found[1]]
        [(1, 9, 4, 8), (1, 9, 2, 8)]
    """
    decodes = hasattr(model, "config") and hasattr(model, "set_attn_implementation")
    check(decodes, WATCH, "model", "must be a model of transformers", type(model).__name__)
    free = not any(c._attn_implementation == POLICY for c in configs_of(model))
    check(free, WATCH, "model", "must have no policy", type(model).__name__)
    check(callable(visit), WATCH, "visit", "must be callable", visit)

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        scaling = args[1] if len(args) > 1 else kw.get("scaling")
        scoring = {"scale": scaling, "softcap": kw.get("softcap") or 0.0, "sink": kw.get("s_aux")}
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            fail(WATCH, "model", "must have layers with a layer_idx", type(module).__name__)
        visit(layer, query.transpose(1, 2), key.transpose(1, 2), scoring)
        return forward(module, query, key, value, *args, **kw)

    forward = functools.partial(attention_forward, kind="softmax", backend=backend)
    AttentionInterface.register(WATCHED, attend)
    AttentionMaskInterface.register(WATCHED, build_mask)
    before = [(c, c._attn_implementation) for c in configs_of(model)]
    try:
        model.set_attn_implementation(WATCHED)  # type: ignore[operator]
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
