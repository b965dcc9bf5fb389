"""The behaviour of the heads of a transformers model on repeated tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .._check import as_int, check, check_version, needs
from .retrieval import profile_repeated_tokens

try:
    import transformers
except ModuleNotFoundError as missing:
    raise needs("transformers", missing) from missing

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .._transformers.models import KEEP, POLICY
from .._transformers.watch import watch_attention

NAME = "policies.RazorAttention.profile"


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
    free = KEEP not in vars(model) and config._attn_implementation != POLICY
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
