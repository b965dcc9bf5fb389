"""Faults in the pipelines of the sm_90a kernels: in the synchronisation between producer warps,
consumer warps and epilogue. Survivors and reasons are in docs/notebook/emulated.md."""

from __future__ import annotations

import pytest
from test_mutants import run
from tier import FULL, full_only

from tokenmill._call import library

mutate = pytest.importorskip("ptxvm.mutate", reason="the package ptxvm is not installed")
Mutation, places, sections = mutate.Mutation, mutate.places, mutate.sections

FORWARD = "attention_forward_sm90_kernelI6__halfLi64ELNS0_7WeightsE0"
BACKWARD = "attention_backward_sm90_kernelI6__halfLi64ELNS0_7WeightsE0"
WIDE = "attention_backward_sm90_kernelI6__halfLi256ELNS0_7WeightsE0"
SPARSE = "block_sparse_forward_sm90_kernelI6__halfLi64E"
SPARSE_QUERIES = "block_sparse_queries_sm90_kernelI6__halfLi64E"  # of the backward
SPARSE_KEYS = "block_sparse_keys_sm90_kernelI6__halfLi64E"
RECURRENCE = "recurrence_sm90_kernelI6__halfLi128E"  # of linear attention
KERNELS = (FORWARD, BACKWARD, WIDE, SPARSE, SPARSE_QUERIES, SPARSE_KEYS, RECURRENCE)
MULTIPROCESSORS = 2  # so that each CTA has several tiles
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
# Faults without observable effect, by kernel, kind and number of the place; reasons are in the
# notebook.
WITHOUT_EFFECT = {
    *((FORWARD, "products awaited behind the release", number) for number in (1, 3)),
    (FORWARD, "barrier dropped", 5),
    *((BACKWARD, "phase", number) for number in (1, 4)),
    *((kernel, "proxy fence dropped", number) for kernel in (BACKWARD, WIDE) for number in (0, 1)),
    *((WIDE, "phase", number) for number in (2, 19)),
    (WIDE, "wait removed", 16),
    (SPARSE, "arrivals", 1),
    (SPARSE, "phase", 1),
    (SPARSE, "products awaited behind the release", 2),
    *((SPARSE, "barrier dropped", number) for number in (1, 3)),
    (SPARSE_QUERIES, "wait removed", 3),
    (SPARSE_QUERIES, "products awaited behind the release", 0),
    (SPARSE_QUERIES, "barrier dropped", 1),
}
DAILY = [
    Mutation(FORWARD, "arrive dropped", 1, drawn=False),
    Mutation(FORWARD, "products awaited late", 3, drawn=False),
    Mutation(BACKWARD, "proxy fence dropped", 3, drawn=False),
    Mutation(BACKWARD, "bytes not expected", 0, drawn=False),
    Mutation(WIDE, "phase", 0, drawn=False),
    Mutation(WIDE, "arrive dropped", 5, drawn=False),
]


def faults() -> list[Mutation]:
    """All faults of these kinds in the library's PTX."""
    texts = [text for _, text in sections(library.EMULATED_PATH.read_bytes())]
    found = []
    for kernel in KERNELS:
        text = next(text for text in texts if kernel in text)
        for kind in KINDS:
            count = len(places(text, kernel, kind))
            found += [Mutation(kernel, kind, number, drawn=False) for number in range(count)]
    return found


def test_mutants_of_the_kernels_for_sm90_are_reported() -> None:
    """At least nine in ten of the faults with an effect: the PTX changes with the kernels."""
    rows = run(faults() if FULL else DAILY, MULTIPROCESSORS)
    missed = [
        row
        for row in rows
        if row["verdict"] != "report" and tuple(row["mutation"][:3]) not in WITHOUT_EFFECT
    ]
    assert len(missed) * 10 <= len(rows), "\n".join(map(str, missed))


@full_only
def test_the_kernels_for_sm90_are_right_and_clean() -> None:
    originals = [Mutation(kernel, "original", 0) for kernel in KERNELS]
    rows = run(originals, MULTIPROCESSORS)
    assert [row["verdict"] for row in rows] == ["survived"] * len(KERNELS), rows
