"""The 61 papers that the package started from: what each computes, and the corresponding calls.

`python -m tokenmill papers [word]` prints the index; docs/papers.md is generated from it.

Example:
    >>> import tokenmill as tm
    >>> (evit,) = tm.papers.find("EViT")
    >>> evit.authors, evit.year, evit.call[0]
    ('Liang et al.', 2022, 'tokenmill.nn.EViTReorganize(keep_rate=0.7)')
    >>> [paper.name for paper in tm.papers.find("cluster_tokens")]
    ['Expedit']
    >>> len(tm.papers.PAPERS)
    61
"""

from __future__ import annotations

from .._check import check
from . import caches, dense, heads, linear, masks, none, pooling, sinks, sparse, tokens
from .paper import FAMILIES, Paper
from .search import nearest, rank

__all__ = ["FAMILIES", "PAPERS", "Paper", "find", "nearest"]

_FILES = (dense, sinks, masks, linear, sparse, caches, heads, tokens, pooling, none)
PAPERS: tuple[Paper, ...] = tuple(
    sorted((paper for file in _FILES for paper in file.ROWS), key=lambda paper: paper.number)
)


def find(query: str | int) -> tuple[Paper, ...]:
    """The papers that contain every word of a query, best matches first.

    Words match prefixes, without grammatical endings, in names, titles, authors, keywords, calls,
    computations and notes. A number finds its row, an arXiv identifier or address its paper.

    Args:
        query: words, a number from 1 to 61, or an address.

    Returns:
        The papers, with matches in name or title first; none if a word occurs in no paper.

    Raises:
        RuntimeError: naming argument, rule and value.

    Example:
        >>> from tokenmill import papers
        >>> [paper.number for paper in papers.find("retrieval heads")][:2]
        [53, 24]
        >>> papers.find("https://arxiv.org/abs/2111.11418v3")[0].name
        'PoolFormer'
    """
    known = isinstance(query, (str, int)) and not isinstance(query, bool)
    check(known, "papers.find", "query", "must be a string or a number", query)
    return rank(PAPERS, str(query))
