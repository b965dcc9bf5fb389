"""The texts that a model reads, and the questions after them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._check import check
from ..samples import text

NAME = "evaluation.evaluate"
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.9)  # positions of the repeated passages
GIVEN, REPEATED = 16, 32  # tokens of a passage: read again, then scored
WORDS = (
    "anchor apple arrow basket beacon bell bottle bridge broom button cabin candle canoe carpet "
    "castle chair clock cloud compass copper curtain desert donkey drum engine falcon feather "
    "fiddle forest garden glove hammer harbor helmet honey island jacket kettle ladder lantern "
    "lemon magnet marble meadow mirror needle ocean orchard paddle pebble pepper pillow pocket "
    "puzzle rabbit ribbon river rocket saddle shovel silver spider tunnel violin walnut window"
)
NOUNS = WORDS.split()


@dataclass(frozen=True)
class Question:
    """Tokens that follow a text: those that are given, then those that are scored. An asked
    question is the end of the prompt: a policy reads it before it chooses keys.
    """

    task: str  # "continuation", "copy", "needle" or "asked"
    given: tuple[int, ...]
    scored: tuple[int, ...]
    depth: float = 1.0  # position of what it asks for, as a fraction of the text


@dataclass(frozen=True)
class Text:
    """A prompt and the questions after it."""

    prompt: tuple[int, ...]
    questions: tuple[Question, ...]


def make_text(
    tokenizer: Any,
    length: int,
    *,
    number: int = 0,
    source: str | None = None,
    continuation: int = 256,
    needles: int = 50,
    asked: int = 10,
    depths: Sequence[float] = DEPTHS,
) -> Text:
    """A text of `length` tokens with hidden facts, and its questions.

    Args:
        tokenizer: of the model.
        length: tokens of the text, facts included.
        number: which text, and which facts: each number has its own.
        source: a long text; None: the language reference of Python, which help() prints.
        continuation: tokens after the text that are scored.
        needles: facts "anchor: 4821", each a paragraph, spread evenly; at most 67.
        asked: how many of them the end of the prompt asks for, too, spread evenly; more than
            needles: each.
        depths: positions of the repeated passages, as fractions of the text.

    Raises:
        RuntimeError: naming argument, rule and value, where text or source are too short.
    """
    limit = f"must be from 0 to {len(NOUNS)}"
    check(0 <= needles <= len(NOUNS), NAME, "needles", limit, needles)
    check(asked >= 0, NAME, "asked", "must be at least 0", asked)
    asked = min(asked, needles)
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    check(not wrong, NAME, "depths", "must be from 0 to 1", wrong and wrong[0])
    draw = random.Random(number)
    words = tokenizer(source if source is not None else reference(), add_special_tokens=False)
    tokens: list[int] = words["input_ids"]
    nouns = draw.sample(NOUNS, needles)
    codes = [str(draw.randrange(1000, 10000)) for _ in nouns]
    told = list(zip(nouns, codes, strict=True))
    facts = [encode(tokenizer, f"\n\n{noun}: {code}\n\n") for noun, code in told]
    plain = length - sum(map(len, facts))
    rule = (
        f"must leave a quarter of {length} tokens for the text, and {needles} facts leave {plain}"
    )
    check(plain >= length // 4 and length >= GIVEN + REPEATED, NAME, "needles", rule, needles)
    wanted = plain + continuation
    check(wanted <= len(tokens), NAME, "source", f"must have {wanted} tokens", len(tokens))
    first = draw.randrange(len(tokens) - wanted + 1)
    body = tokens[first : first + wanted]
    prompt: list[int] = []
    places = []
    ends = [plain * (i + 1) // (needles + 1) for i in range(needles + 1)]
    for begin, end, fact in zip([0, *ends], ends, [*facts, []], strict=False):
        prompt += body[begin:end]
        places.append(len(prompt) / length)
        prompt += fact
    questions = [Question("continuation", (), tuple(body[plain:]))]
    for depth in depths:
        start = int(depth * (length - GIVEN - REPEATED))
        passage = tuple(prompt[start : start + GIVEN + REPEATED])
        questions.append(Question("copy", passage[:GIVEN], passage[GIVEN:], depth))
    needed = []
    for (noun, code), place in zip(told, places, strict=False):
        given = encode(tokenizer, f"\n\n{noun}:")
        answer = encode(tokenizer, f"\n\n{noun}: {code}")[len(given) :]
        needed.append(Question("needle", tuple(given), tuple(answer), place))
    questions += needed
    for i in range(asked):
        questions.append(replace(needed[(2 * i + 1) * needles // (2 * asked)], task="asked"))
    return Text(tuple(prompt), tuple(questions))


def reference() -> str:
    """The prose of the language reference."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.prose())


def encode(tokenizer: Any, words: str) -> list[int]:
    return tokenizer(words, add_special_tokens=False)["input_ids"]
