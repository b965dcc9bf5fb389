"""Word search over the rows of the index."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence

from .paper import FAMILIES, Paper

_ADDRESS = re.compile(r"(?:arxiv|alphaxiv|huggingface)\S*?(\d{4}\.\d{5})|^(\d{4}\.\d{5})(?:v\d+)?$")
_ENDINGS = re.compile(r"(?<=\w{4})(ations?|ions?|ings?|ies|ers?|ed|es|s|e|y)$")
_EXACT_LETTERS = 3  # a shorter word too often begins another word
# Stop words.
_COMMON = {"a", "an", "and", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"}


def rank(papers: Sequence[Paper], query: str) -> tuple[Paper, ...]:
    """Papers that contain every word of a query, best matches first.

    A word matches a prefix of a word of the row, after both are stemmed: "prune" finds "pruning",
    "ring" does not find "clustering". Matches in name or title count most, then matches in keywords
    and calls, then the other text. A number or an arXiv address finds one paper.
    """
    text = query.strip().lower()
    if address := _ADDRESS.search(text):
        identifier = address[1] or address[2]
        return tuple(paper for paper in papers if paper.arxiv == identifier)
    if text.isdecimal():
        return tuple(paper for paper in papers if paper.number == int(text))
    wanted = _stems(text)
    found = [(_score(paper, wanted), paper) for paper in papers] if wanted else []
    best = sorted((row for row in found if row[0]), key=lambda row: (-row[0], row[1].number))
    return tuple(paper for _, paper in best)


def nearest(papers: Sequence[Paper], query: str, limit: int = 3) -> list[str]:
    """Names and keywords closest in spelling to a query."""
    terms = sorted({term.lower() for p in papers for term in (p.name, *p.keywords)})
    return difflib.get_close_matches(query.strip().lower(), terms, n=limit, cutoff=0.6)


def _score(paper: Paper, wanted: list[str]) -> int:
    """Sum of the best weight of each query word, higher for a complete name or keyword; 0 if a word
    does not occur in the row.
    """
    total = 0
    for stem in wanted:
        weights = [w for w, stems in _fields(paper) if _matches(stem, stems)]
        if not weights:
            return 0
        total += max(weights)
    whole = wanted == _stems(paper.name), wanted in map(_stems, paper.keywords)
    return total + 20 * whole[0] + 10 * whole[1]


def _matches(stem: str, stems: frozenset[str]) -> bool:
    return stem in stems if len(stem) <= _EXACT_LETTERS else any(s.startswith(stem) for s in stems)


@functools.cache
def _fields(paper: Paper) -> tuple[tuple[int, frozenset[str]], ...]:
    """(weight, stems) of the parts of a row."""
    parts = (
        (8, (paper.name, paper.title)),
        (4, (*paper.keywords, *paper.call, FAMILIES[paper.family], paper.authors)),
        (2, (paper.computes, paper.note, paper.claim, paper.differs, paper.missing)),
    )
    return tuple((w, frozenset(_stem(x) for t in texts for x in _terms(t))) for w, texts in parts)


def _stems(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [_stem(word) for word in words if word not in _COMMON]


def _terms(text: str) -> list[str]:
    """Words in lower case; for an identifier also its parts."""
    words = re.findall(r"\w+", text)
    parts = [part for word in words for part in re.findall(r"[A-Z]*[a-z0-9]+|[A-Z]+", word)]
    return [word.lower() for word in (*words, *parts)]


def _stem(word: str) -> str:
    """A word without its grammatical ending, if at least four letters remain."""
    return _ENDINGS.sub("", word)
