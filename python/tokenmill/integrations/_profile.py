"""Queries and keys of a transformers model, and the behaviour of its heads on repeated tokens."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._check import as_int, check, fail
from ..policies.retrieval import profile_repeated_tokens
from ._needs import needs

try:
    import transformers
except ModuleNotFoundError as missing:
    raise needs("transformers", missing) from missing

from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from ._needs import check_version
from ._policy_cache import IMPLEMENTATION, KEEP, configs_of

NAME = "policies.RazorAttention.profile"
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
    from .transformers import attention_forward, build_mask

    decodes = hasattr(model, "config") and hasattr(model, "set_attn_implementation")
    check(decodes, WATCH, "model", "must be a model of transformers", type(model).__name__)
    free = not any(c._attn_implementation == IMPLEMENTATION for c in configs_of(model))
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


def score_heads(
    model: Any, tokenizer: Any, *, tokens: int, repeats: int, seed: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Echo and induction scores of each KV head of the layers with full attention, [layers, Hk]."""
    check_version(NAME, "transformers", transformers.__version__, 5, 24)
    config = getattr(model, "config", None)
    decodes = hasattr(config, "get_text_config") and hasattr(model, "set_attn_implementation")
    decodes = decodes and not getattr(config, "is_encoder_decoder", False)
    check(decodes, NAME, "model", "must be a decoder of transformers", type(model).__name__)
    config = config.get_text_config(decoder=True)  # type: ignore[union-attr]
    free = KEEP not in vars(model) and config._attn_implementation != IMPLEMENTATION
    check(free, NAME, "model", "must have no policy yet", type(model).__name__)
    tokens, repeats = as_int(NAME, "tokens", tokens), as_int(NAME, "repeats", repeats)
    check(tokens >= 1, NAME, "tokens", "must be at least 1", tokens)
    check(repeats >= 2, NAME, "repeats", "must be at least 2", repeats)
    ids = repeated(config, tokenizer, tokens, repeats, as_int(NAME, "seed", seed))
    period = (len(ids) - 1) // repeats if len(ids) % repeats == 1 else len(ids) // repeats
    full = [type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(layer: int, q: Tensor, k: Tensor, scoring: dict[str, Any]) -> None:
        if layer < len(full) and full[layer]:
            scores = profile_repeated_tokens(q, k, period, backend=backend, **scoring)
            echo, induction = (s[0].unflatten(0, (k.shape[2], -1)).amax(1) for s in scores)
            found[layer] = echo.cpu(), induction.cpu()

    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    device = next(model.parameters()).device
    with watch_attention(model, visit, backend=backend), torch.no_grad():
        model(input_ids=ids.to(device)[None], **options)
    rule = "must have layers with full attention, whose queries transformers hands out"
    check(len(found) == sum(full) > 0, NAME, "model", rule, type(model).__name__)
    echo, induction = zip(*(found[layer] for layer in sorted(found)), strict=True)
    return torch.stack(echo), torch.stack(induction)


def repeated(config: Any, tokenizer: Any, tokens: int, repeats: int, seed: int) -> Tensor:
    """Token ids: a begin token, if there is one, and repeated random tokens."""
    source = config if tokenizer is None else tokenizer
    begin = getattr(source, "bos_token_id", None)
    begin = begin[0] if isinstance(begin, list) else begin
    special = {*getattr(tokenizer, "all_special_ids", ())}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    for one in (getattr(source, name, None) for name in names):
        special |= {*one} if isinstance(one, list) else {one}
    words = config.vocab_size if tokenizer is None else min(len(tokenizer), config.vocab_size)
    known = torch.tensor([i for i in range(words) if i not in special])
    places = getattr(config, "max_position_embeddings", None) or tokens * repeats + 1
    period = min(tokens, len(known), (places - 1) // repeats)
    rule = f"must have positions and words for a text that is repeated {repeats} times"
    check(period >= 1, NAME, "model", rule, f"{places} positions, {len(known)} words")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    ids = known[order[:period]].repeat(repeats)
    return ids if begin is None else torch.cat([torch.tensor([begin]), ids])
