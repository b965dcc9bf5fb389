"""The axioms of the PTX memory model (PTX ISA, chapter 8) over litmus programs, by enumeration.

An execution assigns a write to each read, a coherence order to the writes of each location and an
order to the fence.sc operations; `judge` keeps those that the axioms allow. Programs use the
generic proxy, words of one size and bar.sync.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SCOPES = {"cta": 0, "cluster": 1, "gpu": 2, "sys": 3}
Pairs = set[tuple[int, int]]


@dataclass(frozen=True)
class Step:
    """An instruction of a litmus thread, such as "atom.acq_rel.gpu.add r0 x 1"."""

    text: str

    @property
    def parts(self) -> list[str]:
        return self.text.split()[0].split(".")

    @property
    def operands(self) -> list[str]:
        return self.text.split()[1:]

    @property
    def kind(self) -> str:
        return self.parts[0]

    @property
    def scope(self) -> int:
        return next((SCOPES[part] for part in self.parts if part in SCOPES), 3)

    def has(self, *words: str) -> bool:
        return any(word in self.parts for word in words)

    @property
    def strong(self) -> bool:
        return self.kind in ("atom", "red") or self.has(
            "relaxed", "acquire", "release", "acq_rel", "sc", "volatile"
        )

    @property
    def reads(self) -> bool:
        return self.kind in ("ld", "atom", "red")

    @property
    def writes(self) -> bool:
        return self.kind in ("st", "atom", "red")

    @property
    def register(self) -> str | None:
        return self.operands[0] if self.kind in ("ld", "atom") else None

    @property
    def place(self) -> str | None:
        if not (self.reads or self.writes):
            return None
        return self.operands[0 if self.register is None else 1]


def steps(program: str) -> list[Step]:
    return [Step(text.strip()) for text in program.split(";")]


@dataclass
class Event:
    number: int
    thread: int  # -1: the initial write
    step: Step
    read: int = 0
    written: int | None = None


@dataclass
class Verdict:
    outcomes: set[tuple[tuple[str, int], ...]] = field(default_factory=set)
    race: bool = False


def closure(pairs: Pairs, count: int) -> Pairs:
    reach = [0] * count
    for a, b in pairs:
        reach[a] |= 1 << b
    for k in range(count):
        for i in range(count):
            if reach[i] >> k & 1:
                reach[i] |= reach[k]
    return {(i, j) for i in range(count) for j in range(count) if reach[i] >> j & 1}


def join(left: Pairs, right: Pairs) -> Pairs:
    after: dict[int, set[int]] = {}
    for a, b in right:
        after.setdefault(a, set()).add(b)
    return {(a, c) for a, b in left for c in after.get(b, ())}


def acyclic(pairs: Pairs, count: int) -> bool:
    return all(a != b for a, b in closure(pairs, count))


class Execution:
    """Events of one path through each thread."""

    def __init__(self, paths: Sequence[Sequence[Step]], distance: int) -> None:
        self.distance = distance
        self.events: list[Event] = []
        places = sorted({s.place for path in paths for s in path if s.place})
        for place in places:
            self.add(-1, Step(f"st {place} 0"))
        self.po: Pairs = set()
        for thread, path in enumerate(paths):
            mine = [self.add(thread, step).number for step in path]
            self.po |= set(itertools.combinations(mine, 2))
        self.count = len(self.events)
        self.memory = [e for e in self.events if e.step.place]

    def add(self, thread: int, step: Step) -> Event:
        self.events.append(Event(len(self.events), thread, step))
        return self.events[-1]

    def includes(self, a: Event, b: Event) -> bool:
        """Each operation is strong and its scope includes the other's thread."""
        if a.thread == b.thread:
            return True
        if a.thread < 0 or b.thread < 0:
            return False
        return a.step.strong and b.step.strong and min(a.step.scope, b.step.scope) >= self.distance

    def strong(self, a: Event, b: Event) -> bool:
        """Morally strong (8.7)."""
        same = a.step.place == b.step.place or not (a.step.place and b.step.place)
        return same and self.includes(a, b)

    def values(self, rf: dict[int, int], readers: Sequence[Event]) -> bool:
        """Computes what each event reads and writes; False if a value depends on itself."""
        known: dict[int, int] = {}

        def written(number: int, active: frozenset[int]) -> int | None:
            if number in active:
                return None
            event = self.events[number]
            if number not in known:
                value = self.operand(event, lambda n: written(n, active | {number}), rf)
                if value is None:
                    return None
                known[number] = value
            return known[number]

        for event in self.events:
            if event.step.writes:
                value = written(event.number, frozenset())
                if value is None:
                    return False
                event.written = value
        for event in readers:
            event.read = known[rf[event.number]]
        return True

    def operand(self, event: Event, written, rf) -> int | None:  # type: ignore[no-untyped-def]
        text = event.step.operands[-1]
        value: int | None
        if text.startswith("r"):  # data dependency: the register's read, by the same thread
            (source,) = (
                e
                for e in self.events
                if e.thread == event.thread and e.step.register == text and e is not event
            )
            value = written(rf[source.number])
        else:
            value = int(text)
        if event.step.has("add") and value is not None:
            old = written(rf[event.number])
            return None if old is None else old + value
        return value

    def release_patterns(self) -> Iterator[tuple[Event, Event]]:
        """First operation and write of each (8.8)."""
        for first in self.events:
            if first.thread < 0 or not first.step.has("release", "acq_rel", "sc"):
                continue
            if first.step.writes:
                yield first, first
            for write in self.memory:
                if (first.number, write.number) in self.po and write.step.writes:
                    same = first.step.kind == "fence" or first.step.place == write.step.place
                    if same and write.step.strong:
                        yield first, write

    def acquire_patterns(self) -> Iterator[tuple[Event, Event]]:
        """Read and last operation of each (8.8)."""
        for last in self.events:
            if not last.step.has("acquire", "acq_rel", "sc"):
                continue
            if last.step.reads and last.step.kind != "red":
                yield last, last
            for read in self.memory:
                if (read.number, last.number) in self.po and read.step.reads:
                    same = last.step.kind == "fence" or last.step.place == read.step.place
                    if same and read.step.strong and read.step.kind != "red":
                        yield read, last

    def cause(self, rf: dict[int, int], sc: Sequence[Event]) -> Pairs:
        """Causality order (8.9.5)."""
        # Observation order (8.9.2): only an atomic operation can both be read and read.
        observed = closure(
            {(w, r) for r, w in rf.items() if self.strong(self.events[w], self.events[r])},
            self.count,
        )
        sync = {
            (a.number, b.number)
            for a, b in itertools.combinations(sc, 2)
            if self.includes(a, b) and a.thread != b.thread
        }
        for first, write in self.release_patterns():
            for read, last in self.acquire_patterns():
                if (write.number, read.number) in observed and self.includes(first, last):
                    sync.add((first.number, last.number))
        bars: dict[int, list[Event]] = {}
        for thread in range(max(e.thread for e in self.events) + 1):
            mine = [e for e in self.events if e.thread == thread and e.step.kind == "bar"]
            for instance, event in enumerate(mine):
                bars.setdefault(instance, []).append(event)
        for group in bars.values():
            sync |= {(a.number, b.number) for a, b in itertools.permutations(group, 2)}
        start = {
            (a.number, b.number)
            for a in self.events
            for b in self.events
            if a.thread < 0 <= b.thread
        }
        base = closure(self.po | sync | start, self.count)
        return base | join(observed, base)

    def consistent(
        self, rf: dict[int, int], order: dict[str, Sequence[Event]], sc: Sequence[Event]
    ) -> Pairs | None:
        """The causality order if the axioms hold (8.10), else None."""
        cause = self.cause(rf, sc)
        if any(
            (b.number, a.number) in cause
            for a, b in itertools.combinations(sc, 2)
            if self.includes(a, b)
        ):
            return None  # Fence-SC
        related: Pairs = set()
        for writes in order.values():
            for a, b in itertools.combinations(writes, 2):
                if (b.number, a.number) in cause:
                    return None  # Coherence
                if self.strong(a, b) or (a.number, b.number) in cause:
                    related.add((a.number, b.number))
        co = closure(related, self.count)
        fr = {
            (r, after) for r, w in rf.items() for before, after in co if before == w and r != after
        }
        seen = {(w, r) for r, w in rf.items()}
        if any((b, a) in cause for a, b in seen | fr | co):
            return None  # Causality
        events = self.events
        for r, w in rf.items():  # Atomicity of read-modify-writes
            if events[r].step.writes and any(
                (w, x) in co and (x, r) in co and self.strong(events[x], events[r])
                for x in range(self.count)
            ):
                return None
        local = {
            (a, b)
            for a, b in self.po
            if events[a].step.place and events[a].step.place == events[b].step.place
        }
        strong = {(a, b) for a, b in seen | fr | co if self.strong(events[a], events[b])}
        return cause if acyclic(local | strong, self.count) else None  # SC per location

    def races(self, cause: Pairs) -> bool:
        """Data races (8.7.1)."""
        return any(
            a.thread != b.thread
            and min(a.thread, b.thread) >= 0
            and a.step.place == b.step.place
            and (a.step.writes or b.step.writes)
            and not self.strong(a, b)
            and not {(a.number, b.number), (b.number, a.number)} & cause
            for a, b in itertools.combinations(self.memory, 2)
        )


def paths(program: Sequence[Step]) -> Iterator[tuple[list[Step], list[tuple[str, int, bool]]]]:
    """Ways through a thread: it ends at the first "if" that does not hold."""
    done: list[Step] = []
    held: list[tuple[str, int, bool]] = []
    for step in program:
        if step.kind == "if":
            register, value = step.operands[0], int(step.operands[1])
            yield list(done), [*held, (register, value, False)]
            held.append((register, value, True))
        else:
            done.append(step)
    yield done, held


def judge(programs: Sequence[str], distance: str) -> Verdict:
    """Outcomes that the axioms allow, and whether some execution has a data race."""
    verdict = Verdict()
    for choice in itertools.product(*(list(paths(steps(p))) for p in programs)):
        execution = Execution([path for path, _ in choice], SCOPES[distance])
        held = [condition for _, conditions in choice for condition in conditions]
        readers = [e for e in execution.memory if e.step.reads]
        writers: dict[str, list[Event]] = {}
        for event in execution.memory:
            if event.step.writes:
                writers.setdefault(str(event.step.place), []).append(event)
        fences = [e for e in execution.events if e.step.kind == "fence" and e.step.has("sc")]
        sources = [[w.number for w in writers[str(r.step.place)] if w is not r] for r in readers]
        for chosen in itertools.product(*sources):
            rf = dict(zip((r.number for r in readers), chosen, strict=True))
            if not execution.values(rf, readers):
                continue  # No thin air
            read = {str(e.step.register): e.read for e in readers if e.step.register}
            if any((read[register] == value) != is_held for register, value, is_held in held):
                continue
            orders = [
                [[all_[0], *rest] for rest in itertools.permutations(all_[1:])]
                for all_ in writers.values()
            ]
            for order in itertools.product(*orders):
                by_place = dict(zip(writers, order, strict=True))
                for sc in itertools.permutations(fences):
                    cause = execution.consistent(rf, by_place, sc)
                    if cause is None:
                        continue
                    verdict.race |= execution.races(cause)
                    final = {place: int(all_[-1].written or 0) for place, all_ in by_place.items()}
                    verdict.outcomes.add(tuple(sorted({**read, **final}.items())))
    return verdict


def allows(verdict: Verdict, outcome: str) -> bool:
    """True if some outcome has all the values of "r0=1 r1=0"."""
    wanted = {(name, int(value)) for name, value in re.findall(r"(\w+)=(\d+)", outcome)}
    return any(wanted <= set(found) for found in verdict.outcomes)
