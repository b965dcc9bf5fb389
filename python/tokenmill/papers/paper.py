"""A row of the paper index."""

from __future__ import annotations

from dataclasses import dataclass

STATES = ("whole", "in part", "no computation")
BACKENDS = ("cpu", "cuda", "triton", "reference")
PLAIN = ("plain PyTorch",)
IMPORTS = "import torch\nimport tokenmill as tm\n\n"  # the first lines of every snippet

FAMILIES = {
    "dense": "Attention with other weights and scores",
    "sinks": "Attention sinks and calibrated weights",
    "masks": "Masks, schedules and shards of attention",
    "linear": "Linear attention and memories",
    "sparse": "Sparse and long-context attention",
    "caches": "KV caches and decoding",
    "heads": "Heads that retrieve",
    "tokens": "Tokens that are kept, merged or dropped",
    "pooling": "Pooling and token mixing",
    "none": "No computation for a kernel",
}


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper, its computation, the corresponding calls, and what they were checked against.

    Attributes:
        number: 1 to 61, position of the paper in the list that the package started from.
        name: the name of the method.
        title, authors: as on the paper.
        arxiv: arXiv identifier.
        family: a key of FAMILIES.
        computes: the computation for which there are kernels, in one line; "" if there is none.
        call: the calls that compute it, with the arguments that the paper or its released code
            sets. Empty if there is no such computation; then note says why.
        test: files that test the calls against the paper or its released code. Each name in call
            occurs in one of them.
        example: a program of the source tree that uses a call.
        backends: the backends that run the calls and that the tests ran on, or "plain PyTorch".
        checked: source of the tests' oracle: "released code: owner/repository at commit", "text
            only", or "peer: " and its name.
        differs: differences between the text and the released code, and which of them is followed.
        missing: the parts that are not implemented, and why; "" if the whole computation is.
        claim: the gain claimed by the paper.
        measured: a figure of docs/performance.md to compare with the claim.
        counted: a figure counted by a test on any CPU (operations, bytes, keys read).
        note: a limitation or a choice that a reader must know.
        keywords: words and synonyms that a reader would search for.
        snippet: self-contained Python code.
    """

    number: int
    name: str
    title: str
    authors: str
    arxiv: str
    family: str = "none"
    computes: str = ""
    call: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    example: str | None = None
    backends: tuple[str, ...] = ()
    checked: str = ""
    differs: str = ""
    missing: str = ""
    claim: str = ""
    measured: str = ""
    counted: str = ""
    note: str = ""
    keywords: tuple[str, ...] = ()
    snippet: str = ""

    @property
    def year(self) -> int:
        """Year of the first version, which precedes the conference."""
        return 2000 + int(self.arxiv[:2])

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def state(self) -> str:
        """One of "whole", "in part" and "no computation"."""
        return STATES[2] if not self.call else STATES[1] if self.missing else STATES[0]
