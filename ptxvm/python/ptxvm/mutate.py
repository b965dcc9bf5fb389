"""Mutants of a kernel: faults in its PTX as a mistake in the source would cause them.

An edit keeps the length of the text, so that it also works inside a compiled library or program
with uncompressed PTX:

    python -m ptxvm.mutate FILE KIND NUMBER      # number of the place, from 0
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Edit = Callable[[re.Match[str], random.Random], str]


@dataclass(frozen=True)
class Mutation:
    kernel: str  # substring of the entry's name
    kind: str
    seed: int  # selects the place
    drawn: bool = True  # random place; else numbered in the order of the text

    def __str__(self) -> str:
        return f"{self.kernel}-{self.kind}-{self.seed}"


@dataclass(frozen=True)
class Change:
    line: int  # line in the text, from 1
    before: str
    after: str


def _blank(found: re.Match[str], _: random.Random) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def _digits(shift: Callable[[int, random.Random], int]) -> Edit:
    """Replaces the number in group `n` by another one with as many digits."""

    def edit(found: re.Match[str], choice: random.Random) -> str:
        old = found["n"]
        start = found.start("n") - found.start()
        new = str(shift(int(old), choice))
        if len(new) != len(old) or new[0] == "-":
            new = str(max(int(old) - 1, 0)).rjust(len(old))
        return found[0][:start] + new + found[0][start + len(old) :]

    return edit


def _lane(found: re.Match[str], _: random.Random) -> str:
    """Replaces the lane distance so that the reduction uses one distance twice and omits
    another."""
    group = "n" if found["n"] else "m"
    old, start, end = found[group], found.start(group) - found.start(), found.end(group)
    new = str(int(old) // 2 or 2).rjust(len(old))
    return found[0][:start] + new + found[0][end - found.start() :]


def _swap(found: re.Match[str], _: random.Random) -> str:
    a, b = sorted(("a", "b"), key=found.start)
    text, base = found[0], found.start()
    spans = [(found.start(g) - base, found.end(g) - base) for g in (a, b)]
    (i, j), (k, m) = spans
    return text[:i] + text[k:m] + text[j:k] + text[i:j] + text[m:]


def _padded(new: str, old: str) -> str:
    return new.ljust(len(old)) if len(new) <= len(old) else old


def _without_bytes(found: re.Match[str], _: random.Random) -> str:
    """Replaces arrive.expect_tx by an arrival that expects no bytes."""
    plain = re.sub(r"\.expect_tx|(?<=\]), [^;,]*(?=;)", "", found[0])
    return _padded(plain, found[0])


def _other_phase(found: re.Match[str], choice: random.Random) -> str:
    """Replaces the phase of a wait by a constant."""
    start = found.start("n") - found.start()
    return found[0][:start] + _padded(choice.choice("01"), found["n"])


def _other_count(found: re.Match[str], _: random.Random) -> str:
    """Changes the arrival count: one more if it is a constant, three if it is a register."""
    start = found.start("n") - found.start()
    new = "3" if found["n"][0] == "%" else str(int(found["n"]) + 1)
    return found[0][:start] + _padded(new, found["n"]) + ";"


def _word(**words: str) -> Edit:
    """Replaces a word by another one of the same length."""

    def edit(found: re.Match[str], _: random.Random) -> str:
        word = found["w"]
        start = found.start("w") - found.start()
        return found[0][:start] + words[word] + found[0][start + len(word) :]

    return edit


def _without_wait(found: re.Match[str], _: random.Random) -> str:
    """Replaces a wait by a constant: the phase counts as complete."""
    new = f"mov.u32 {found['n']}, 1;"
    return new + re.sub(r"[^\n]", " ", found[0][len(new) :])


def _behind(found: re.Match[str], _: random.Random) -> str:
    """Moves the first part after the rest."""
    return found["rest"] + found["first"]


_COMPARISONS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}


def _compare(found: re.Match[str], _: random.Random) -> str:
    return found[0].replace(f".{found['op']}.", f".{_COMPARISONS[found['op']]}.", 1)


_GUARD = r"(@!?%?\w+[ \t]+)?"  # guard of the matched instruction

KINDS: dict[str, tuple[str, Edit]] = {
    "barrier dropped": (r"(bar\.sync|barrier\.sync)[^;]*;", _blank),
    "wait weakened": (r"cp\.async\.wait_group[ \t]+(?P<n>\d+)", _digits(lambda n, _: n + 1)),
    "wait dropped": (r"cp\.async\.wait_(group|all)[^;]*;", _blank),
    # nvcc moves the lane into a register before the shuffle; Triton writes it in the shuffle.
    "lane": (
        r"mov\.[ub]32[ \t]+%r\d+, (?P<n>1|2|4|8|16);(?=\n([^\n]*\n){0,3}[^\n]*shfl\.sync)"
        r"|shfl\.sync\.(bfly|down|up|idx)\.b32[^;]*, (?P<m>1|2|4|8|16), \d+, -1",
        _lane,
    ),
    "swizzle": (r"xor\.b32[^;]*, (?P<n>\d+);", _digits(lambda n, c: n ^ (1 << c.choice([3, 4])))),
    "address": (
        r"(ld|st|cp\.async|ldmatrix)[.\w:]*[ \t][^;]*\[%\w+\+(?P<n>\d+)\]",
        _digits(lambda n, c: n + c.choice([-4, 4, -16, 16])),
    ),
    "constant": (
        r"(add|sub|shl|shr|mad\.lo|mul\.lo|mul\.wide)\.[su]?b?\w+[ \t][^;]*, (?P<n>\d+);",
        _digits(lambda n, c: n + c.choice([-1, 1])),
    ),
    "guard dropped": (r"@!?%p\d+ (?!bra)(?=\w)", _blank),
    "comparison": (r"setp\.(?P<op>lt|le|gt|ge|eq|ne)\.[su]\d\d[^;]*;", _compare),
    "operands": (r"(sub|selp)\.[fbsu]\d\d[ \t]+%\w+, (?P<a>%\w+), (?P<b>[^,;]+)[^;]*;", _swap),
    "addend": (
        r"fma\.rn\.f32[ \t]+%\w+, (?P<a>%f\d+|%r\d+), [^,;]+, (?P<b>%f\d+|%r\d+);",
        _swap,
    ),
    "fragment": (
        r"mma\.sync[^;{]*\{[^}]*\}[,\s]*\{\s*(?P<a>%\w+),\s*(?P<b>%\w+)[^;]*;",
        _swap,
    ),
    "matrix": (r"ldmatrix[^;{]*\{\s*(?P<a>%\w+),\s*(?P<b>%\w+)[^;]*;", _swap),
    # Synchronisation: mbarriers, asynchronous operations, and waits between blocks.
    "arrive dropped": (_GUARD + r"mbarrier\.arrive\.(?!expect_tx)[^;]*;", _blank),
    "bytes not expected": (r"mbarrier\.arrive\.expect_tx[^;]*;", _without_bytes),
    "arrivals": (r"mbarrier\.init[^;]*, (?P<n>%?\w+);", _other_count),
    "phase": (r"mbarrier\.(try|test)_wait\.parity[^;\[]*\[[^\]]*\], (?P<n>%\w+)", _other_phase),
    # The loop of a wait, not its first try_wait.
    "wait skipped": (r"mbarrier\.try_wait[^;]*;\s*@P1 bra DONE;\s*bra\s+LAB_WAIT;", _blank),
    "wait removed": (
        r"mbarrier\.try_wait[^;]*;\s*selp\.u32[ \t]+(?P<n>%\w+), 1, 0, \w+;",
        _without_wait,
    ),
    "proxy fence dropped": (_GUARD + r"fence\.proxy\.async[^;]*;", _blank),
    "products awaited late": (
        r"wgmma\.wait_group\.sync\.aligned[ \t]+(?P<n>\d+)",
        _digits(lambda n, _: n + 1),
    ),
    "products not awaited": (_GUARD + r"wgmma\.wait_group[^;]*;", _blank),
    # A stage is released, or a turn passed on, before its use has finished.
    "products awaited behind the release": (
        r"(?P<first>wgmma\.wait_group[^;]*;)"
        r"(?P<rest>((?!wgmma)[\s\S])*?mbarrier\.arrive((?!wgmma)[\s\S])*?\n\$L\w+:)",
        _behind,
    ),
    "copies awaited behind the release": (
        r"(?P<first>cp\.async\.bulk\.wait_group[ \t]+\d+;)(?P<rest>[^}]*?st\.release[^;]*;)",
        _behind,
    ),
    "value behind its flag": (
        r"(?P<first>st\.cg[^;]*;)(?P<rest>((?!st\.)[\s\S])*?st\.release[^;]*;)",
        _behind,
    ),
    "bulk wait dropped": (_GUARD + r"cp\.async\.bulk\.wait_group[^;]*;", _blank),
    "cluster barrier dropped": (_GUARD + r"barrier\.cluster\.(arrive|wait)[^;]*;", _blank),
    "fence dropped": (_GUARD + r"(membar\.(gl|sys)|fence\.(acq_rel|sc)\.\w+)[^;]*;", _blank),
    "order relaxed": (
        r"(ld|st|atom|red)\.(?P<w>release|acquire|acq_rel)\.",
        _word(release="relaxed", acquire="relaxed", acq_rel="relaxed"),
    ),
    "scope lowered": (
        r"(ld|st|atom|red|fence)\.\w+\.(?P<w>gpu|sys)\b",
        _word(gpu="cta", sys="cta"),
    ),
}


def bodies(text: str) -> dict[str, tuple[int, int]]:
    """Span of each entry in the text, up to the closing brace of its body."""
    found = {}
    for entry in re.finditer(r"\.entry[ \t]+(\w+)", text):
        depth = 0
        for brace in re.compile(r"[{}]").finditer(text, entry.end()):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                found[entry[1]] = (entry.start(), brace.start())
                break
    return found


def places(text: str, kernel: str, kind: str) -> list[re.Match[str]]:
    pattern = re.compile(KINDS[kind][0])
    found = []
    for name, (start, end) in bodies(text).items():
        if kernel not in name:
            continue
        constants = set(re.findall(r"mov\.f32[ \t]+(%\w+), 0f", text[start:end]))
        for place in pattern.finditer(text, start, end):
            # A constant product in expf or logf splits the argument: many splits are equally good.
            if kind == "addend" and constants & set(re.findall(r"%\w+", place[0])):
                continue
            # shr.s32 by 32 equals shr.s32 by 31: the same program.
            if kind == "constant" and re.match(r"shr\.s32[^;]*, 31;", place[0]):
                continue
            found.append(place)
    return found


def _at(text: str, found: re.Match[str], kind: str, choice: random.Random) -> tuple[str, Change]:
    """The text with a fault of the kind at a place; the unchanged text if there is no such
    place."""
    new = KINDS[kind][1](found, choice)
    if len(new) != len(found[0]):
        new = found[0]
    line = text.count("\n", 0, found.start()) + 1
    changed = text[: found.start()] + new + text[found.end() :]
    return changed, Change(line, found[0].strip(), new.strip())


def mutate(text: str, mutation: Mutation) -> tuple[str, Change]:
    """The text with one fault, deterministic for a mutation."""
    candidates = places(text, mutation.kernel, mutation.kind)
    if not mutation.drawn:
        at = mutation.seed
        return _at(text, candidates[at], mutation.kind, random.Random(at))
    choice = random.Random(str(mutation))
    choice.shuffle(candidates)
    for found in candidates[mutation.seed % max(len(candidates), 1) :] + candidates:
        changed, change = _at(text, found, mutation.kind, choice)
        if changed != text:
            return changed, change
    raise LookupError(f"{mutation}: no such place")


def mutants(text: str, kinds: Sequence[str]) -> Iterator[tuple[str, int, str, Change]]:
    """Yields kind, place number, text and change of every fault of these kinds."""
    for kind in kinds:
        for number, found in enumerate(places(text, "", kind)):
            changed, change = _at(text, found, kind, random.Random(number))
            if changed != text:
                yield kind, number, changed, change


def sections(image: bytes) -> Iterator[tuple[int, str]]:
    """PTX texts in a library or program, with their offsets."""
    for found in re.finditer(rb"\.version \d", image):
        start = image.rfind(b"\0", 0, found.start()) + 1
        yield start, image[start : image.find(b"\0", start)].decode("latin1")


def write_text(path: Path, number: int, text: str) -> None:
    """Replaces section `number` by a text of the same length."""
    image = path.read_bytes()
    start, old = list(sections(image))[number]
    assert len(text) == len(old)
    path.write_bytes(image[:start] + text.encode("latin1") + image[start + len(old) :])


def main(path: Path, kind: str, wanted: int) -> None:
    for at, (_, text) in enumerate(sections(path.read_bytes())):
        for _, number, changed, change in mutants(text, [kind]):
            if number == wanted:
                write_text(path, at, changed)
                print(f"line {change.line}: {change.before} => {change.after or 'nothing'}")
                return
    raise LookupError(f"{path}: no such place")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
