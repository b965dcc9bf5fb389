"""Whole pretrained models: attention and linear layers of ours, against those of transformers and
against OpenVINO.

A sentence encoder on batches of text in float32, and a language model's prompt and next token in
bfloat16 (tokenmill.samples.models says which packages have the weights). Ours is the model with
attention by `integrations.transformers.register` and linear layers by `integrations.linear.enable`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenmill.samples import models, text

from . import engines
from .case import Case, Run

PROMPT, CACHED = 2048, 8191  # tokens of the language model


def _inference(run: Run) -> Run:
    return torch.inference_mode()(run)


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _with_ours(model: Any, linear: bool = True) -> Any:
    """A copy of the model; linear: with its linear layers by oneDNN, too."""
    from tokenmill.integrations import linear as layers
    from tokenmill.integrations.transformers import register

    ours = copy.deepcopy(model)
    ours.set_attn_implementation(register())
    if linear:
        layers.enable(ours, pack=True)
    return ours


def _size(model: nn.Module) -> int:
    """Weights of the linear layers."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


class _Encoder(nn.Module):
    """Ids and mask as positional arguments, hidden states as the result."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids, attention_mask).last_hidden_state
        return found


def _encode(batch: text.Batch) -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        _quiet()
        model, tokenizer = models.minilm()
        tokens = tokenizer(batch.texts(), padding=True, truncation=True, return_tensors="pt")
        given = tokens["input_ids"], tokens["attention_mask"]

        def run_of(model: Any) -> Run:
            return _inference(functools.partial(_Encoder(model), *given))

        return run_of(_with_ours(model)), {
            "SDPA": lambda: run_of(model),
            "ours, linear layers of torch": lambda: run_of(_with_ours(model, linear=False)),
            "OpenVINO": lambda: engines.openvino_model(_Encoder(model), given),
        }

    # of the model as published: weights of its linear layers, layers and heads
    size, layers, width = 10_765_440, 6, 384
    counts = [(count, words) for count, words in batch.passages]
    tokens = sum(count * words for count, words in counts) * 4 / 3
    work = 2 * size * tokens + 4 * layers * width * sum(c * (w * 4 / 3) ** 2 for c, w in counts)
    return Case(
        "models", f"all-MiniLM-L6-v2, {batch.name} batch", torch.float32, work, 4.0 * size, prepare
    )


def _language_model() -> Any:
    _quiet()
    return models.smollm2(torch.bfloat16)[0]


class _Prompt(nn.Module):
    """Ids to the logits of the last token. masked: with a mask, so that transformers does not look
    for packed sequences by torch.diff, which OpenVINO cannot convert.
    """

    def __init__(self, model: Any, masked: bool = False) -> None:
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = torch.ones_like(input_ids) if self.masked else None
        found: Tensor = self.model(
            input_ids, attention_mask=mask, use_cache=False, logits_to_keep=1
        ).logits
        return found


def _prefill() -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        model = _language_model()
        given = (torch.randint(1000, 20000, (1, PROMPT), generator=torch.manual_seed(0)),)

        def run_of(model: Any) -> Run:
            return _inference(functools.partial(_Prompt(model), *given))

        return run_of(_with_ours(model)), {
            "SDPA": lambda: run_of(model),
            "ours, linear layers of torch": lambda: run_of(_with_ours(model, linear=False)),
            "OpenVINO": lambda: engines.openvino_model(_Prompt(model, masked=True), given),
        }

    return _llama_case(f"prompt of {PROMPT} tokens", PROMPT, PROMPT * (PROMPT + 1) // 2, prepare)


def _decode() -> Case:
    def prepare() -> tuple[Run, dict[str, Callable[[], Run]]]:
        from transformers import DynamicCache

        from tokenmill.integrations.transformers import GrowingCache

        model = _language_model()

        def run_of(model: Any, make: Any) -> Run:
            cache, generator = make(config=model.config), torch.Generator().manual_seed(0)
            c = model.config
            shape = (1, c.num_key_value_heads, CACHED, c.head_dim)
            for layer in range(c.num_hidden_layers):
                k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
                cache.update(k, v, layer)
            ids = torch.tensor([[1000]])

            def run() -> Tensor:
                logits: Tensor = model(ids, cache=cache).logits
                cache.crop(-1)
                return logits

            return _inference(run)

        return run_of(_with_ours(model), GrowingCache), {
            "SDPA": lambda: run_of(model, DynamicCache),
            "ours, linear layers of torch": lambda: run_of(
                _with_ours(model, linear=False), GrowingCache
            ),
        }

    return _llama_case(f"a token after {CACHED}", 1, CACHED + 1, prepare)


def _llama_case(name: str, tokens: int, pairs: int, prepare: Any) -> Case:
    # of the model as published: weights of its layers and of its head, layers, heads
    size, head, layers, heads, kv_heads, dim = 106_168_320, 28_311_552, 30, 9, 3, 64
    work = 2.0 * (size * tokens + head) + 4.0 * layers * heads * dim * pairs
    cached = 2 * layers * kv_heads * dim * (pairs if tokens == 1 else tokens)
    moved = 2.0 * (size + head + cached)
    return Case("models", f"SmolLM2-135M, {name}", torch.bfloat16, work, moved, prepare)


def cases() -> Iterator[Case]:
    for batch in text.BATCHES:
        yield _encode(batch)
    yield _prefill()
    yield _decode()
