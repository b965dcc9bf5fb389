"""The litmus programs; litmus.py runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Litmus:
    name: str
    threads: tuple[str, ...]
    outcome: str
    paragraph: str  # of the PTX ISA 9.0
    where: str = "blocks"  # threads are lane 0 of blocks, of blocks of a cluster, of warps
    shared: bool = False
    by_hand: tuple[bool, bool] | None = None  # allowed, race: beyond the axioms of litmus_model
    remark: str = ""
    options: Mapping[str, object] = field(default_factory=dict, hash=False)


PATTERNS = "8.8, 8.9.4"
STRONG = "8.7"
RACE = "8.7.1"
CAUSALITY = "8.10.6"
LOCATION = "8.10.5"
NO_BUFFER = "loads are performed in order"
ONE_ORDER = "a store reaches all threads at once"


def mp(write: str, read: str, before: str = "", after: str = "") -> tuple[str, str]:
    """Message passing: data, then a flag."""
    return (
        f"st x 1; {before}{write} f 1",
        f"{read} r0 f; {after}if r0 1; ld r1 x",
    )


MESSAGES = [
    ("MP, release and acquire", mp("st.release.gpu", "ld.acquire.gpu"), "blocks", PATTERNS),
    ("MP, .sys", mp("st.release.sys", "ld.acquire.sys"), "blocks", PATTERNS),
    ("MP, relaxed write", mp("st.relaxed.gpu", "ld.acquire.gpu"), "blocks", PATTERNS),
    ("MP, relaxed read", mp("st.release.gpu", "ld.relaxed.gpu"), "blocks", PATTERNS),
    ("MP, weak flag", mp("st", "ld"), "blocks", RACE),
    ("MP, volatile flag", mp("st.volatile", "ld.volatile"), "blocks", "8.4.2"),
    ("MP, release of .cta", mp("st.release.cta", "ld.acquire.gpu"), "blocks", STRONG),
    ("MP, acquire of .cta", mp("st.release.gpu", "ld.acquire.cta"), "blocks", STRONG),
    ("MP, .cta in a block", mp("st.release.cta", "ld.acquire.cta"), "warps", PATTERNS),
    ("MP, .cta in a cluster", mp("st.release.cta", "ld.acquire.cta"), "cluster", STRONG),
    (
        "MP, .cluster in a cluster",
        mp("st.release.cluster", "ld.acquire.cluster"),
        "cluster",
        PATTERNS,
    ),
    (
        "MP, .cluster between clusters",
        mp("st.release.cluster", "ld.acquire.cluster"),
        "blocks",
        STRONG,
    ),
    (
        "MP, fences",
        mp("st.relaxed.gpu", "ld.relaxed.gpu", "fence.acq_rel.gpu; ", "fence.acq_rel.gpu; "),
        "blocks",
        PATTERNS,
    ),
    (
        "MP, no second fence",
        mp("st.relaxed.gpu", "ld.relaxed.gpu", "fence.acq_rel.gpu; "),
        "blocks",
        PATTERNS,
    ),
    (
        "MP, first fence of .cta",
        mp("st.relaxed.gpu", "ld.relaxed.gpu", "fence.acq_rel.cta; ", "fence.acq_rel.gpu; "),
        "blocks",
        STRONG,
    ),
    (
        "MP, second fence of .cta",
        mp("st.relaxed.gpu", "ld.relaxed.gpu", "fence.acq_rel.gpu; ", "fence.acq_rel.cta; "),
        "blocks",
        STRONG,
    ),
    (
        "MP, flag of .cta between fences of .gpu",
        mp("st.relaxed.cta", "ld.relaxed.gpu", "fence.acq_rel.gpu; ", "fence.acq_rel.gpu; "),
        "blocks",
        STRONG,
    ),
    (
        "MP, fences around a weak flag",
        mp("st", "ld", "fence.acq_rel.gpu; ", "fence.acq_rel.gpu; "),
        "blocks",
        PATTERNS,
    ),
    (
        "MP, fence.sc",
        mp("st.relaxed.gpu", "ld.relaxed.gpu", "fence.sc.gpu; ", "fence.sc.gpu; "),
        "blocks",
        "8.9.4",
    ),
    (
        "MP, a strong write after the release",
        (
            "st x 1; st.release.gpu f 1; st.relaxed.gpu f 2",
            "ld.acquire.gpu r0 f; if r0 2; ld r1 x",
        ),
        "blocks",
        "8.8",
    ),
    (
        "MP, an atomic of another thread goes on",
        (
            "st x 1; st.release.gpu f 1",
            "atom.relaxed.gpu.add r2 f 1",
            "ld.acquire.gpu r0 f; if r0 2; ld r1 x",
        ),
        "blocks",
        "8.9.2",
    ),
    (
        "MP, a store of another thread does not",
        (
            "st x 1; st.release.gpu f 1",
            "ld.relaxed.gpu r2 f; if r2 1; st.relaxed.gpu f 2",
            "ld.acquire.gpu r0 f; if r0 2; ld r1 x",
        ),
        "blocks",
        "8.9.2",
    ),
    (
        "MP, red does not acquire",
        (
            "st x 1; st.release.gpu f 1",
            "red.acquire.gpu.add f 1; ld.relaxed.gpu r0 f; if r0 2; ld r1 x",
        ),
        "blocks",
        "8.8",
    ),
    (
        "MP, a ticket",
        (
            "st x 1; fence.acq_rel.gpu; atom.relaxed.gpu.add r2 f 1",
            "atom.relaxed.gpu.add r0 f 1; fence.acq_rel.gpu; if r0 1; ld r1 x",
        ),
        "blocks",
        PATTERNS,
    ),
    (
        "MP, data between relaxed flags",
        (
            "st.relaxed.gpu x 1; st.relaxed.gpu f 1",
            "ld.relaxed.gpu r0 f; ld.relaxed.gpu r1 x",
        ),
        "blocks",
        CAUSALITY,
    ),
]
# Programs whose outcome is r0=2 r1=0.
LATER = {
    "MP, a strong write after the release",
    "MP, an atomic of another thread goes on",
    "MP, a store of another thread does not",
    "MP, red does not acquire",
}


def message_passing() -> list[Litmus]:
    return [
        Litmus(name, threads, "r0=2 r1=0" if name in LATER else "r0=1 r1=0", paragraph, where)
        for name, threads, where, paragraph in MESSAGES
    ]


def buffering() -> list[Litmus]:
    def sb(fence: str, strong: str = ".relaxed.gpu") -> tuple[str, str]:
        return (
            f"st{strong} x 1; {fence}ld{strong} r0 y",
            f"st{strong} y 1; {fence}ld{strong} r1 x",
        )

    def dekker(fence: str) -> tuple[str, str]:
        return (
            f"st.relaxed.gpu x 1; {fence}; ld.relaxed.gpu r0 y; if r0 0; st d 1",
            f"st.relaxed.gpu y 1; {fence}; ld.relaxed.gpu r1 x; if r1 0; st d 2",
        )

    def lb(value: str, other: str) -> tuple[str, str]:
        return (
            f"ld.relaxed.gpu r0 x; st.relaxed.gpu y {value}",
            f"ld.relaxed.gpu r1 y; st.relaxed.gpu x {other}",
        )

    none = "r0=0 r1=0"
    return [
        Litmus("SB, relaxed", sb(""), none, CAUSALITY),
        Litmus("SB, weak", sb("", ""), none, RACE),
        Litmus(
            "SB, release and acquire",
            ("st.release.gpu x 1; ld.acquire.gpu r0 y", "st.release.gpu y 1; ld.acquire.gpu r1 x"),
            none,
            PATTERNS,
        ),
        Litmus("SB, fence.acq_rel", sb("fence.acq_rel.gpu; "), none, PATTERNS),
        Litmus("SB, fence.sc", sb("fence.sc.gpu; "), none, "8.10.2"),
        Litmus("SB, fence.sc of .cta", sb("fence.sc.cta; "), none, STRONG),
        Litmus("SB, fence.sc of .cta in a block", sb("fence.sc.cta; "), none, "8.10.2", "warps"),
        Litmus(
            "SB, one fence.sc",
            (sb("fence.sc.gpu; ")[0], sb("fence.acq_rel.gpu; ")[1]),
            none,
            "8.10.2",
        ),
        Litmus(
            "SB, atomics",
            (
                "atom.relaxed.gpu.exch r2 x 1; ld.relaxed.gpu r0 y",
                "atom.relaxed.gpu.exch r3 y 1; ld.relaxed.gpu r1 x",
            ),
            none,
            CAUSALITY,
            remark="atomics do not wait in the buffer",
        ),
        Litmus(
            "SB, bar.sync",
            ("st x 1; bar; ld r0 y", "st y 1; bar; ld r1 x"),
            none,
            "8.9.4",
            "warps",
        ),
        Litmus("Dekker, fence.sc", dekker("fence.sc.gpu"), none, "8.10.2"),
        Litmus("Dekker, fence.acq_rel", dekker("fence.acq_rel.gpu"), none, PATTERNS),
        Litmus("Dekker, fence.sc of .cta", dekker("fence.sc.cta"), none, STRONG),
        Litmus("LB, relaxed", lb("1", "1"), "r0=1 r1=1", "8.10.4", remark=NO_BUFFER),
        Litmus("LB, with values", lb("r0", "r1"), "r0=1 r1=1", "8.10.4"),
        Litmus(
            "LB, acquire and release",
            (
                "ld.acquire.gpu r0 x; st.release.gpu y 1",
                "ld.acquire.gpu r1 y; st.release.gpu x 1",
            ),
            "r0=1 r1=1",
            CAUSALITY,
        ),
    ]


def several() -> list[Litmus]:
    def iriw(read: str, fence: str = "") -> tuple[str, ...]:
        return (
            "st.relaxed.gpu x 1",
            "st.relaxed.gpu y 1",
            f"{read} r0 x; {fence}{read} r1 y",
            f"{read} r2 y; {fence}{read} r3 x",
        )

    def wrc(write: str, read: str, last: str = "ld.acquire.gpu") -> tuple[str, ...]:
        return (
            "st x 1; st.release.gpu f 1",
            f"{read} r0 f; if r0 1; {write} y 1",
            f"{last} r1 y; if r1 1; ld r2 x",
        )

    split = "r0=1 r1=0 r2=1 r3=0"
    late = "r0=1 r1=1 r2=0"
    return [
        Litmus("IRIW, relaxed", iriw("ld.relaxed.gpu"), split, CAUSALITY, remark=ONE_ORDER),
        Litmus("IRIW, acquire", iriw("ld.acquire.gpu"), split, CAUSALITY, remark=ONE_ORDER),
        Litmus("IRIW, fence.sc", iriw("ld.relaxed.gpu", "fence.sc.gpu; "), split, "8.10.2"),
        Litmus(
            "IRIW, fence.acq_rel",
            iriw("ld.relaxed.gpu", "fence.acq_rel.gpu; "),
            split,
            CAUSALITY,
            remark=ONE_ORDER,
        ),
        Litmus("WRC, cumulative", wrc("st.release.gpu", "ld.acquire.gpu"), late, "8.9.5"),
        Litmus("WRC, relaxed between", wrc("st.relaxed.gpu", "ld.acquire.gpu"), late, "8.9.5"),
        Litmus("WRC, no acquire between", wrc("st.release.gpu", "ld.relaxed.gpu"), late, "8.9.5"),
        Litmus(
            "WRC, last acquire relaxed",
            wrc("st.release.gpu", "ld.acquire.gpu", "ld.relaxed.gpu"),
            late,
            "8.9.5",
        ),
        Litmus(
            "WRC, .cta between",
            wrc("st.release.cta", "ld.acquire.gpu"),
            late,
            STRONG,
        ),
        Litmus(
            "2+2W, relaxed",
            (
                "st.relaxed.gpu x 1; st.relaxed.gpu y 2",
                "st.relaxed.gpu y 1; st.relaxed.gpu x 2",
            ),
            "x=1 y=1",
            LOCATION,
        ),
        Litmus(
            "2+2W, fence.sc",
            (
                "st.relaxed.gpu x 1; fence.sc.gpu; st.relaxed.gpu y 2",
                "st.relaxed.gpu y 1; fence.sc.gpu; st.relaxed.gpu x 2",
            ),
            "x=1 y=1",
            "8.10.2",
        ),
    ]


def coherence() -> list[Litmus]:
    return [
        Litmus(
            "CoRR",
            ("st.relaxed.gpu x 1", "ld.relaxed.gpu r0 x; ld.relaxed.gpu r1 x"),
            "r0=1 r1=0",
            LOCATION,
        ),
        Litmus("CoRR, weak", ("st x 1", "ld r0 x; ld r1 x"), "r0=1 r1=0", RACE, remark=NO_BUFFER),
        Litmus(
            "CoRR, a weak read",
            ("st.relaxed.gpu x 1", "ld.relaxed.gpu r0 x; ld r1 x"),
            "r0=1 r1=0",
            CAUSALITY,
        ),
        Litmus("CoWW", ("st.relaxed.gpu x 1; st.relaxed.gpu x 2",), "x=1", LOCATION),
        Litmus("CoWR", ("st x 1; ld r0 x",), "r0=0", CAUSALITY),
        Litmus(
            "CoRW",
            ("ld.relaxed.gpu r0 x; st.relaxed.gpu x 1", "st.relaxed.gpu x 2"),
            "r0=1",
            LOCATION,
        ),
        Litmus(
            "CoRW2",
            ("ld.relaxed.gpu r0 x; st.relaxed.gpu x 1", "st.relaxed.gpu x 2"),
            "r0=2 x=2",
            LOCATION,
        ),
        Litmus("writes of .cta", ("st.relaxed.cta x 1", "st.relaxed.cta x 2"), "x=1", STRONG),
        Litmus("writes of .gpu", ("st.relaxed.gpu x 1", "st.relaxed.gpu x 2"), "x=1", STRONG),
        Litmus(
            "atomics of .gpu",
            ("atom.relaxed.gpu.add r0 x 1", "atom.relaxed.gpu.add r1 x 1"),
            "r0=0 r1=0",
            "8.10.3",
        ),
        Litmus(
            "atomics of .cta between blocks",
            ("atom.relaxed.cta.add r0 x 1", "atom.relaxed.cta.add r1 x 1"),
            "r0=0 r1=0",
            STRONG,
            remark="atomics of all scopes are atomic",
        ),
        Litmus(
            "atomics of .cta in a block",
            ("atom.relaxed.cta.add r0 x 1", "atom.relaxed.cta.add r1 x 1"),
            "r0=0 r1=0",
            "8.10.3",
            "warps",
        ),
        Litmus(
            "a weak write beside an atomic",
            ("st x 5", "atom.relaxed.gpu.add r0 x 1"),
            "r0=5",
            RACE,
        ),
    ]


SHARED: dict[str, Any] = {"where": "warps", "shared": True}
WAIT, ARRIVE, LOAD = "wait.mbarrier", "arrive.mbarrier", "load.bulk x g"
PROXIES = "8.6, 9.7.9.25.2"
BARRIERS = [
    Litmus("bar.sync", ("st x 1; bar", "bar; ld r0 x"), "r0=0", "8.9.4", **SHARED),
    Litmus("bar.sync, global", ("st x 1; bar", "bar; ld r0 x"), "r0=0", "8.9.4", "warps"),
    Litmus("bar.sync, too early", ("bar; st x 1", "bar; ld r0 x"), "r0=0", RACE, **SHARED),
    Litmus(
        "mbarrier",
        (f"st x 1; {ARRIVE}", f"{WAIT}; ld r0 x"),
        "r0=0",
        "8.8",
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "mbarrier, relaxed arrival",
        (f"st x 1; {ARRIVE}.relaxed.cta", f"{WAIT}; ld r0 x"),
        "r0=0",
        "8.8",
        by_hand=(True, True),
        **SHARED,
    ),
    Litmus(
        "mbarrier, relaxed arrival after a fence",
        (f"st x 1; fence.acq_rel.cta; {ARRIVE}.relaxed.cta", f"{WAIT}; ld r0 x"),
        "r0=0",
        "8.8",
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "mbarrier, relaxed wait",
        (f"st x 1; {ARRIVE}", f"{WAIT}.relaxed.cta; ld r0 x"),
        "r0=0",
        "8.8",
        by_hand=(True, True),
        remark=NO_BUFFER,
        **SHARED,
    ),
    Litmus(
        "mbarrier, relaxed wait before a fence",
        (f"st x 1; {ARRIVE}", f"{WAIT}.relaxed.cta; fence.acq_rel.cta; ld r0 x"),
        "r0=0",
        "8.8",
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "mbarrier, a store after the arrival",
        (f"{ARRIVE}; st x 1", f"{WAIT}; ld r0 x"),
        "r0=0",
        RACE,
        by_hand=(True, True),
        **SHARED,
    ),
    Litmus(
        "bulk load, read before the wait",
        (f"st.relaxed.gpu g 1; {LOAD}", "ld r0 x"),
        "r0=0",
        "8.9.1.1",
        by_hand=(True, True),
        **SHARED,
    ),
    Litmus(
        "bulk load, read after the wait",
        (LOAD, f"{WAIT}; ld r0 x"),
        "r0=1",
        PROXIES,
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "bulk load of a weak store",
        (f"st g 1; {LOAD}", f"{WAIT}; ld r0 x"),
        "r0=0",
        PROXIES,
        by_hand=(True, True),
        remark="a copy sees all stores of its warp",
        **SHARED,
    ),
    Litmus(
        "bulk load of a weak store, proxy fence",
        (f"st g 1; fence.proxy.async; {LOAD}", f"{WAIT}; ld r0 x"),
        "r0=0",
        PROXIES,
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "bulk load over what was read",
        ("ld r0 x; bar", f"bar; {LOAD}; {WAIT}"),
        "r0=1",
        PROXIES,
        by_hand=(False, False),
        remark="a proxy fence is missing by the letter; practice has none",
        **SHARED,
    ),
    Litmus(
        "bulk load over what was read, proxy=strict",
        ("ld r0 x; bar", f"bar; {LOAD}; {WAIT}"),
        "r0=1",
        PROXIES,
        by_hand=(True, True),
        remark="a copy writes after its issue",
        options={"proxy": "strict"},
        **SHARED,
    ),
    Litmus(
        "bulk store of what cp.async wrote",
        ("copy.async x g; wait.async; bar", "bar; store.bulk g x; wait.bulk"),
        "g=1",
        PROXIES,
        by_hand=(False, False),
        remark="a proxy fence is missing by the letter; practice has none",
        **SHARED,
    ),
    Litmus(
        "bulk store, proxy fence of the writer",
        ("st x 1; fence.proxy.async; bar", "bar; store.bulk g x; wait.bulk"),
        "g=0",
        PROXIES,
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "bulk store, proxy fence after the barrier",
        ("st x 1; bar", "bar; fence.proxy.async; store.bulk g x; wait.bulk"),
        "g=0",
        PROXIES,
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "bulk store, no proxy fence",
        ("st x 1; bar", "bar; store.bulk g x; wait.bulk"),
        "g=0",
        PROXIES,
        by_hand=(True, True),
        remark="a copy sees all stores of its block",
        **SHARED,
    ),
    Litmus(
        "bulk store, its source overwritten",
        ("store.bulk g x; bar", "bar; st x 1"),
        "g=1",
        "9.7.9.25.4",
        by_hand=(True, True),
        **SHARED,
    ),
    Litmus(
        "bulk store, wait_group.read",
        ("store.bulk g x; wait.bulk.read; bar", "bar; st x 1"),
        "g=1",
        "9.7.9.25.4",
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "bulk store, wait_group.read before its result is read",
        ("st x 1; fence.proxy.async; store.bulk g x; wait.bulk.read; bar", "bar; ld r0 g"),
        "r0=0",
        "9.7.9.25.4",
        by_hand=(True, True),
        **SHARED,
    ),
    Litmus(
        "bulk store, wait_group",
        ("st x 1; fence.proxy.async; store.bulk g x; wait.bulk; bar", "bar; ld r0 g"),
        "r0=0",
        "9.7.9.25.4",
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "cp.async, wait_all and a barrier",
        ("st g 1; copy.async x g; wait.async; bar", "bar; ld r0 x"),
        "r0=0",
        "9.7.9.25.3",
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "cp.async, a barrier without a wait",
        ("st g 1; copy.async x g; bar", "bar; ld r0 x"),
        "r0=0",
        "9.7.9.25.3",
        by_hand=(True, True),
        **SHARED,
    ),
    Litmus(
        "cp.async, an arrival that follows it",
        ("st g 1; copy.async x g; arrive.async", f"{WAIT}; ld r0 x"),
        "r0=0",
        "8.9.1.1",
        by_hand=(False, False),
        **SHARED,
    ),
    Litmus(
        "cp.async, an arrival that does not",
        (f"st g 1; copy.async x g; {ARRIVE}", f"{WAIT}; ld r0 x"),
        "r0=0",
        "8.9.1.1",
        by_hand=(True, True),
        **SHARED,
    ),
    *(
        Litmus(
            f"bulk store of a block and bulk load of another, {name}",
            (
                f"st x 1; fence.proxy.async; store.bulk g x; wait.bulk; {before}st.release.gpu f 1",
                f"ld.acquire.gpu r0 f; if r0 1; {after}{LOAD}; {WAIT}; ld r1 x",
            ),
            "r0=1 r1=0",
            PROXIES,
            shared=True,
            by_hand=(race, race),
            remark="a copy sees all that happened before it" * race,
        )
        for name, before, after, race in (
            ("no proxy fence", "", "", True),
            ("proxy fence before the release", "fence.proxy.async; ", "", False),
            ("proxy fence after the acquire", "", "fence.proxy.async; ", False),
        )
    ),
]


def programs() -> list[Litmus]:
    return [*message_passing(), *buffering(), *several(), *coherence(), *BARRIERS]
