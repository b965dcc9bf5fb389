"""Text available on every machine with Python: the language reference printed by help()."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

TYPOGRAPHY = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
VOCABULARY = 128  # ASCII


@functools.cache
def paragraphs() -> tuple[str, ...]:
    """All ASCII paragraphs, each once: some topics contain others."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    ascii_only = whole.translate(TYPOGRAPHY).encode("ascii", "ignore").decode()
    return tuple(dict.fromkeys(p for p in ascii_only.split("\n\n") if p.strip()))


@functools.cache
def prose() -> tuple[str, ...]:
    """The paragraphs that are sentences: no headings, grammars or code."""
    return tuple(p for p in paragraphs() if p[0].isupper() and p.rstrip().endswith("."))


def passages(count: int, words: int) -> list[str]:
    """`count` passages of `words` words, spread evenly over the prose, each from the beginning of a
    paragraph.
    """
    found = prose()
    pieces = []
    for number in range(count):
        start = number * len(found) // count
        piece: list[str] = []
        for paragraph in found[start:] + found[:start]:
            piece += paragraph.split()
            if len(piece) >= words:
                break
        pieces.append(" ".join(piece[:words]))
    return pieces


@dataclass(frozen=True)
class Batch:
    """Number of passages, and words per passage, that are embedded together."""

    name: str
    passages: tuple[tuple[int, int], ...]

    def texts(self) -> list[str]:
        return [p for count, words in self.passages for p in passages(count, words)]


BATCHES = (
    Batch("short", ((16, 9),)),
    Batch("middle", ((8, 85),)),
    Batch("long", ((2, 420),)),
    Batch("mixed", ((2, 9), (1, 85), (1, 420))),
)


def characters() -> tuple[Tensor, Tensor]:
    """The text as codes below VOCABULARY: nine tenths for training, the last tenth for
    validation.
    """
    whole = bytearray("\n\n".join(paragraphs()), "ascii")
    codes = torch.frombuffer(whole, dtype=torch.uint8).long()
    split = len(codes) * 9 // 10
    return codes[:split], codes[split:]


@functools.cache
def pair_loss() -> float:
    """Cross-entropy on the validation text, in nats per character, of a bigram model with the pair
    frequencies of the training text.
    """
    train, validation = characters()
    pairs = torch.bincount(train[:-1] * VOCABULARY + train[1:], minlength=VOCABULARY**2)
    counts = pairs.view(VOCABULARY, VOCABULARY).double() + 0.01
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    return -log_p[validation[:-1], validation[1:]].mean().item()
