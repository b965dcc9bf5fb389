"""The 61 papers that the package began from: what each computes, and how that is called here.

`python -m tokenmill papers [word]` prints the index, docs/papers.md is made from it.

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
from .others import OTHERS
from .paper import Paper
from .table import TABLE

__all__ = ["PAPERS", "Paper", "find"]

PAPERS: tuple[Paper, ...] = tuple(sorted((*TABLE, *OTHERS), key=lambda paper: paper.number))


def find(word: str | int) -> tuple[Paper, ...]:
    """The papers that a word occurs in, whatever its case: in name, title, authors, computation or
    call. The number of a paper, here or at arXiv, finds that paper alone.

    Args:
        word: any part of these, or a number.

    Returns:
        The papers in the order of their numbers; none if the word occurs in none.

    Raises:
        RuntimeError: naming argument, rule and value.

    Example:
        >>> from tokenmill import papers
        >>> [paper.number for paper in papers.find("retrieval head")]
        [24, 53]
        >>> papers.find(59)[0].call
        ('tokenmill.nn.PoolFormerMixing(pool_size=3)', 'tokenmill.local_pool(subtract_input=True)')
    """
    known = isinstance(word, (str, int)) and not isinstance(word, bool)
    check(known, "papers.find", "word", "must be a string or a number", word)
    text = str(word).strip().lower()
    numbered = tuple(paper for paper in PAPERS if text in (str(paper.number), paper.arxiv))
    if numbered or isinstance(word, int):
        return numbered
    return tuple(paper for paper in PAPERS if text in _words(paper))


def _words(paper: Paper) -> str:
    fields = (paper.name, paper.title, paper.authors, paper.computes, *paper.call)
    return "\n".join(fields).lower()
