"""A row of the index of papers."""

from __future__ import annotations

from dataclasses import dataclass

STATES = ("in the package", "not in the package", "no computation")
BACKENDS = ("cpu", "cuda", "triton", "reference")
PLAIN = ("plain PyTorch",)


@dataclass(frozen=True)
class Paper:
    """A paper, what it computes, and how that is called here.

    Attributes:
        number: 1 to 61, the place of the paper in the list that the package began from.
        name: what the method is called.
        title, authors: of the paper.
        arxiv: its number there.
        computes: the computation that kernels are for, in one line; "" if there is none.
        call: what computes it, with the arguments that the paper or its released code sets. Empty
            if nothing does: the package may still lack it (then computes says what), or there is no
            such computation (then note says why).
        test: the file that holds the call to a literal reading of the paper.
        example: a program of the source tree that uses the call.
        backends: those that run the call, or "plain PyTorch" where it has none.
        claim: what the paper says that it gains.
        measured: what docs/performance.md has to set against that.
        note: what a reader must know beside.
    """

    number: int
    name: str
    title: str
    authors: str
    arxiv: str
    computes: str = ""
    call: tuple[str, ...] = ()
    test: str | None = None
    example: str | None = None
    backends: tuple[str, ...] = ()
    claim: str = ""
    measured: str = ""
    note: str = ""

    @property
    def year(self) -> int:
        """Of the first version, which came before the conference."""
        return 2000 + int(self.arxiv[:2])

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def state(self) -> str:
        """One of "in the package", "not in the package" and "no computation"."""
        return STATES[0] if self.call else STATES[1] if self.computes else STATES[2]
