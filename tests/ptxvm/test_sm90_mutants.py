"""Faults in the pipelines of our own kernels for compute capability 9.0: in what warps that load,
add up and multiply tell each other. Survivors and reasons are in docs/notebook/ptxvm.md."""

from __future__ import annotations

from mutate import Mutation, places, sections
from test_mutants import run
from tier import FULL, full_only

from tokenmill import _library

FORWARD = "attention_forward_sm90_kernelI6__halfLi64ELNS0_7WeightsE0"
BACKWARD = "attention_backward_sm90_kernelI6__halfLi64ELNS0_7WeightsE0"
MULTIPROCESSORS = 2  # so that a block has several tiles
KINDS = (
    "arrive dropped",
    "bytes not expected",
    "arrivals",
    "phase",
    "wait removed",
    "proxy fence dropped",
    "products awaited late",
    "products not awaited",
    "products awaited behind the release",
    "bulk wait dropped",
    "barrier dropped",
    "copies awaited behind the release",
    "order relaxed",
    "scope lowered",
)
# Faults that nothing can show, by kernel, kind and number of the place; the page says why.
WITHOUT_EFFECT = {
    (FORWARD, "products awaited late", 5),
    (FORWARD, "products not awaited", 5),
    *((FORWARD, "wait removed", number) for number in (1, 2)),
    (BACKWARD, "phase", 1),
    *((BACKWARD, "proxy fence dropped", number) for number in (0, 1)),
    *((BACKWARD, "products awaited late", number) for number in (2, 5)),
    *((BACKWARD, "products not awaited", number) for number in (2, 5)),
}
DAILY = [
    Mutation(FORWARD, "arrive dropped", 1, drawn=False),
    Mutation(FORWARD, "products awaited late", 3, drawn=False),
    Mutation(BACKWARD, "proxy fence dropped", 3, drawn=False),
    Mutation(BACKWARD, "bytes not expected", 0, drawn=False),
]


def faults() -> list[Mutation]:
    """All of these kinds, in the text of the library."""
    texts = [text for _, text in sections(_library.EMULATED_PATH.read_bytes())]
    found = []
    for kernel in (FORWARD, BACKWARD):
        text = next(text for text in texts if kernel in text)
        for kind in KINDS:
            count = len(places(text, kernel, kind))
            found += [Mutation(kernel, kind, number, drawn=False) for number in range(count)]
    return found


def test_mutants_of_the_kernels_for_sm90_are_reported() -> None:
    """Nine in ten, of those with an effect: the text of the library changes with its kernels."""
    rows = run(faults() if FULL else DAILY, MULTIPROCESSORS)
    missed = [
        row
        for row in rows
        if row["verdict"] != "report" and tuple(row["mutation"][:3]) not in WITHOUT_EFFECT
    ]
    assert len(missed) * 10 <= len(rows), "\n".join(map(str, missed))


@full_only
def test_the_kernels_for_sm90_are_right_and_clean() -> None:
    originals = [Mutation(kernel, "original", 0) for kernel in (FORWARD, BACKWARD)]
    assert [row["verdict"] for row in run(originals, MULTIPROCESSORS)] == ["survived"] * 2
